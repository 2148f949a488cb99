"""What is refused under launchers that are not ours."""

from __future__ import annotations

import pytest

from lora_lightning.cli.sweep.elsewhere import refuse_repeated
from lora_lightning.errors import LoraConfigError


def test_a_value_given_twice_is_refused_with_the_launcher_that_knows_better():
    with pytest.raises(LoraConfigError, match=r"lora\.r=8, learning_rate=0\.1 is there more than once.*lora_local"):
        refuse_repeated(["lora.r=8,16,8", "learning_rate=0.1,0.1", "seed=1,2"])


def test_other_sweeps_are_not():
    refuse_repeated(["lora.r=8,16", "seed=range(1,4)", "learning_rate=interval(0.1,0.2)", "name=a", "+x=[1,1]"])
