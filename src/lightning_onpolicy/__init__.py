"""Post-train small language models on their own rollouts, inside PyTorch Lightning.

Sub-packages, from the ground up: :mod:`~lightning_onpolicy.kernels` (per-token loss maths, torch alone),
:mod:`~lightning_onpolicy.datamodules` (where on-policy data comes from), :mod:`~lightning_onpolicy.modules`
(one method per file), :mod:`~lightning_onpolicy.callbacks`, and the ``onpolicy`` command.
"""

__version__ = "0.1.0"
