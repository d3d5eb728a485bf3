"""Entry points for ``torch.hub.load(<this checkout>, <name>, source="local")``, under upstream's names."""

from dinov2_custom.hub.backbones import (  # noqa: F401
    dinov2_vitb14,
    dinov2_vitb14_reg,
    dinov2_vitg14,
    dinov2_vitg14_reg,
    dinov2_vitl14,
    dinov2_vitl14_reg,
    dinov2_vits14,
    dinov2_vits14_reg,
)
from dinov2_custom.hub.cell_dino.backbones import (  # noqa: F401
    cell_dino_cp_vits8,
    cell_dino_hpa_vitl14,
    cell_dino_hpa_vitl16,
    channel_adaptive_dino_vitl16,
)
from dinov2_custom.hub.classifiers import (  # noqa: F401
    dinov2_vitb14_lc,
    dinov2_vitb14_reg_lc,
    dinov2_vitg14_lc,
    dinov2_vitg14_reg_lc,
    dinov2_vitl14_lc,
    dinov2_vitl14_reg_lc,
    dinov2_vits14_lc,
    dinov2_vits14_reg_lc,
)
from dinov2_custom.hub.depthers import (  # noqa: F401
    dinov2_vitb14_dd,
    dinov2_vitb14_ld,
    dinov2_vitg14_dd,
    dinov2_vitg14_ld,
    dinov2_vitl14_dd,
    dinov2_vitl14_ld,
    dinov2_vits14_dd,
    dinov2_vits14_ld,
)
from dinov2_custom.hub.dinotxt import dinov2_vitl14_reg4_dinotxt_tet1280d20h24l  # noqa: F401
from dinov2_custom.hub.xray_dino.backbones import xray_dino_vitl16  # noqa: F401

dependencies = ["torch", "tqdm"]
