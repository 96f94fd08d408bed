"""What the tests of attacks share."""

from pathlib import Path

import pytest
from victim import write_target


@pytest.fixture
def target() -> str:
    """The run folder of a target that was never trained."""
    return write_target(Path("victim"))
