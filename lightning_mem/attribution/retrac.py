"""ReTrac: TracIn with every timestep's gradient brought to length 1."""

from lightning_mem.attribution.tracin import TracIn


class ReTrac(TracIn):
    r"""TracIn between unit gradients, so that no timestep and no image wins by the length of its gradient alone.

    .. math:: I(i, x) = \sum_c \eta_c\,(s_c - s_{c-1})\,\Big\langle \frac{1}{K}\sum_k
        \frac{\nabla_\theta L(\theta_c; x_{t_k})}{|\nabla_\theta L(\theta_c; x_{t_k})|},\ \frac{1}{K}\sum_k
        \frac{\nabla_\theta L(\theta_c; x_{i, t_k})}{|\nabla_\theta L(\theta_c; x_{i, t_k})|} \Big\rangle

    where L at a timestep is the mean over ``gradients.num_draws`` draws of noise. An image with a long gradient looks
    influential for every query under TracIn; here scaling its gradient changes nothing. It costs more than TracIn:
    every timestep has a backward pass of its own.

    Args:
        checkpoints: See :class:`TracIn`.
        gradients: See :class:`TracIn`.

    Source:
        Xie et al., arXiv:2401.09031, section 5 (Diffusion-ReTrac).
    """

    name = "retrac"
    unit = True
