"""Attacks: what can be got out of a target; one published method, one file."""

from lightning_mem.attacks.audit import Audit
from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.class_guidance import ClassGuidance
from lightning_mem.attacks.cliques import Clique, largest_cliques, tiled_distances
from lightning_mem.attacks.clusters import Clusters, cluster, cohesion, isolation, keep_clusters
from lightning_mem.attacks.extraction import Extraction
from lightning_mem.attacks.gradient_norm import GradientNorm
from lightning_mem.attacks.guided import SurrogateGuidance
from lightning_mem.attacks.inpainting import Inpainting
from lightning_mem.attacks.likelihood import FlowLikelihood
from lightning_mem.attacks.lira import LiRA, least_shadows, likelihood_ratios
from lightning_mem.attacks.loss import LossAttack
from lightning_mem.attacks.loss_scores import calibrated_verdict, loss_z, reconstruction_losses
from lightning_mem.attacks.membership import AbstractMembership
from lightning_mem.attacks.memberships import Memberships
from lightning_mem.attacks.noise_norm import NoiseNorm, noise_norms
from lightning_mem.attacks.one_step import OneStepExtraction, one_step_scores
from lightning_mem.attacks.pfami import PFAMI
from lightning_mem.attacks.pia import PIA
from lightning_mem.attacks.prompted import PromptedExtraction
from lightning_mem.attacks.protection_scores import copy_reduction, frechet_ratio
from lightning_mem.attacks.protections import Protections
from lightning_mem.attacks.pseudo_labels import PseudoLabels
from lightning_mem.attacks.secmi import SecMI
from lightning_mem.attacks.secmi_network import SecMINetwork
from lightning_mem.attacks.side import SIDE
from lightning_mem.attacks.sima import SimA
from lightning_mem.attacks.unique_law import expected_unique
