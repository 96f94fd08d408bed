"""D-TRAK: TRAK on the norm of the prediction."""

from lightning_mem.attribution.gradients import OutputName
from lightning_mem.attribution.trak import TRAK


class DTRAK(TRAK):
    r"""TRAK with the mean square of the predicted noise in place of the loss, for training images and queries alike.

    .. math:: F(\theta; x_t, t) = \frac{1}{d}\,|\epsilon_\theta(x_t, t)|^2

    Nothing says why a gradient that knows nothing of the noise it should predict tells more of the training set than
    that of the loss; in the paper's trials it does. Everything else as :class:`TRAK`.

    Args:
        lam: See :class:`TRAK`.
        gradients: See :class:`TRAK`.

    Source:
        Zheng et al., arXiv:2311.00500, section 3.2 (mean-squared-L2-norm).
    """

    name = "d_trak"
    output: OutputName = "squared_norm"
