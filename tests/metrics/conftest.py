import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Weights of torch-fidelity's Inception drawn at random: right in shape, meaningless to the eye."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    # its constructor insists on a file: one that is not read leaves the weights it has drawn
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        network = FeatureExtractorInceptionV3("drawn", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), path)
    return path
