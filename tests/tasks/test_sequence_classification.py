import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from lora_lightning.errors import LoraConfigError
from lora_lightning.tasks import SequenceClassification

NAMES = ["business", "sport", "tech"]


@pytest.fixture
def labelled(rows):
    for number, row in enumerate(rows):
        row["labels"] = torch.tensor(number % 3)
    return rows


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return SequenceClassification("demo:tiny-llama", num_labels=3, label_names=NAMES, learning_rate=1e-2)


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_config_names_the_classes(classifier):
    assert classifier.model.config.id2label == dict(enumerate(NAMES))
    assert classifier.model.config.label2id == {"business": 0, "sport": 1, "tech": 2}
    assert classifier.model.config.pad_token_id == classifier.tokenizer.pad_token_id
    assert classifier.lora_task_type == "SEQ_CLS"


def test_metrics_are_those_of_all_rows(fit, labelled, classifier):
    classifier.learning_rate = 0.0
    trainer = fit(classifier, labelled, 3, validation=labelled)  # batches of 3, 3 and 2 rows
    batch = stacked(labelled)
    with torch.no_grad():
        output = classifier.model(**batch)
    metrics = trainer.callback_metrics
    torch.testing.assert_close(metrics["val_loss"], output.loss, rtol=1e-5, atol=1e-6)
    accuracy = multiclass_accuracy(output.logits, batch["labels"], 3, average="micro")
    torch.testing.assert_close(metrics["val_accuracy"], accuracy)
    torch.testing.assert_close(metrics["val_f1"], multiclass_f1_score(output.logits, batch["labels"], 3))


def test_learns(fit, labelled, classifier):
    trainer = fit(classifier, labelled, 4, validation=labelled, max_epochs=20)
    assert trainer.callback_metrics["val_accuracy"] == 1.0
    trainer.test(classifier, torch.utils.data.DataLoader(labelled, 4), verbose=False)
    assert trainer.callback_metrics["test_accuracy"] == 1.0


def test_short_last_batch_weighs_by_rows(fit, labelled):
    """Rows 0-4 and 5-7 accumulated train as all eight at once."""
    states = []
    for size, accumulate in ((5, 2), (8, 1)):
        torch.manual_seed(0)
        module = SequenceClassification(
            "demo:tiny-llama", num_labels=3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
        )
        fit(module, labelled, size, accumulate_grad_batches=accumulate)
        states.append(module.model.state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], atol=1e-5, rtol=0)


def test_predict(labelled, classifier):
    batch = stacked(labelled)
    predicted = classifier.predict_step(batch)
    with torch.no_grad():
        probabilities = classifier.model(**batch).logits.softmax(-1)
    assert [row["label"] for row in predicted] == [NAMES[index] for index in probabilities.argmax(-1)]
    assert list(predicted[0]["probabilities"]) == NAMES
    assert list(predicted[0]["probabilities"].values()) == pytest.approx(probabilities[0].tolist())


@pytest.mark.parametrize(
    ("num_labels", "label_names", "message"),
    [
        (1, None, "at least 2, got 1"),
        ("5", None, "got '5'"),
        (3, ["a", "b"], "3 different names, got 2"),
        (2, ["a", "a"], "different"),
    ],
)
def test_wrong_classes(num_labels, label_names, message):
    with pytest.raises(LoraConfigError, match=message):
        SequenceClassification("demo:tiny-llama", num_labels=num_labels, label_names=label_names)


def test_unnamed_classes():
    module = SequenceClassification("demo:tiny-llama", num_labels=2)
    assert module.label_names == ["LABEL_0", "LABEL_1"]
