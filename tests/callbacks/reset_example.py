"""Both resets in a small project that has nothing to do with language models: ``python reset_example.py``.

A regression model is held near a frozen copy of itself, so it stops part of the way. Whenever validation stalls, the
copy becomes the model as it is, Adam starts anew, and learning goes on.
"""

import copy

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_onpolicy.callbacks import OptimizerReset, ReferenceReset, Stall


class Anchored(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        prediction = self.policy(x)
        kl = (
            0.5 * (prediction - self.reference(x)).pow(2).mean()
        )  # of unit normals around the two predictions
        self.log("kl", kl)
        return F.mse_loss(prediction, y) + 2.0 * kl

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.mse_loss(self.policy(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data(seed):
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.prod(1, keepdim=True) + x.sum(1, keepdim=True)), batch_size=32)


def main(callbacks=(), epochs=40, **trainer):
    pl.seed_everything(0, verbose=False)
    resets = [
        ReferenceReset(Stall("val_loss", mode="min", patience=2, min_delta=0.002, min_gap=16)),
        OptimizerReset(),  # no trigger of its own: with every ReferenceReset
    ]
    module = Anchored()
    run = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*resets, *callbacks], **trainer)
    run.fit(module, data(0), data(1))
    return module, run, resets


if __name__ == "__main__":
    _, run, (reference, optimizer) = main(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    print(
        f"{reference.count} and {optimizer.count} resets, validation loss {run.callback_metrics['val_loss']:.3f}"
    )
