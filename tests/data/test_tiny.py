from lora_lightning.data import TinyText


def test_rows_follow_the_seed(tokenizer):
    def rows(seed):
        train, val, _, _ = TinyText(tokenizer=tokenizer, seed=seed).records()
        return [record.messages for record in train + val]

    assert len(rows(0)) == 256 + 32
    assert rows(0) == rows(0)
    assert rows(0) != rows(1)
    answers = {said["content"].split(" is ")[0]: said["content"] for _, said in rows(0)}
    assert {said["content"] for _, said in rows(0)} == set(answers.values())  # a thing has one colour


def test_a_batch_and_prompts(tokenizer):
    data = TinyText(tokenizer=tokenizer)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    sample = data.sample_prompts()[0]
    assert sample.prompt.endswith(f"{sample.shown}<|im_end|>\n<|im_start|>assistant\n")
    assert sample.reference.startswith("The ")
