"""Defenses: what keeps a target from giving its training images away; one published method, one file."""

from lightning_mem.defenses.amg import AMG
from lightning_mem.defenses.certificates import Certificates, final_confidence
from lightning_mem.defenses.confidence import Form, certainty_slope, confidence
from lightning_mem.defenses.cpsample import CPSample
from lightning_mem.defenses.pipelines import protected_pipeline
from lightning_mem.defenses.protection import AMGProtection, CPSampleProtection, load_protector, training_images
from lightning_mem.defenses.rejection import NearestRejection, NoCopy, Undecided, UndecidedRejection
