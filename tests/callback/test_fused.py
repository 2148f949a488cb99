"""The callback lets optimizers step fused, and a run with it clips and resumes as any does."""

import torch

from lora_lightning import LoraCallback, LoraConfig


def test_a_run_steps_fused_clips_and_resumes_to_the_bit(module_class, make_trainer, tmp_path):
    class Own(module_class):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def run(epochs, **fit):
        module = Own()
        trainer = make_trainer(LoraCallback(LoraConfig(r=2)), max_epochs=epochs, gradient_clip_val=0.5)
        trainer.fit(module, **fit)
        assert [group["fused"] for group in trainer.optimizers[0].param_groups] == [True]
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.state_dict()

    torch.manual_seed(0)
    whole = run(2)
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)["optimizer_states"][0]
    assert saved["param_groups"][0]["fused"] is None
    torch.manual_seed(0)
    run(1)
    resumed = run(2, ckpt_path=tmp_path / "1.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
