import pytest
from planting import Planted


@pytest.fixture
def planted() -> Planted:
    return Planted.draw()
