"""What was written before and now, side by side."""

from lora_lightning.reports.page.folder import pairs_of


def _time(*texts, prompts=("Write a headline …", "Write a headline …")):
    return {"samples": [{"prompt": p, "written": w, "reference": w} for p, w in zip(prompts, texts, strict=True)]}


def test_prompts_that_begin_alike_keep_their_own_texts():
    assert [before for before, _ in pairs_of(_time("a", "b"), _time("c", "d"))] == ["a", "b"]


def test_other_prompts_are_found_by_their_words():
    first, last = _time("a", "b", prompts=("x", "y")), _time("c", "d", prompts=("y", "z"))
    assert [before for before, _ in pairs_of(first, last)] == ["b", None]
