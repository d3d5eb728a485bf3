"""The three training losses, under upstream's names."""

from dinov2_custom.loss.dino_clstoken_loss import DINOLoss
from dinov2_custom.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2_custom.loss.koleo_loss import KoLeoLoss
