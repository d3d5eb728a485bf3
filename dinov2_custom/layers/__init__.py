"""Building blocks of the models, under upstream's names."""

from dinov2_custom.layers.attention import Attention, MemEffAttention
from dinov2_custom.layers.block import Block, CausalAttentionBlock, NestedTensorBlock
from dinov2_custom.layers.dino_head import DINOHead
from dinov2_custom.layers.drop_path import DropPath
from dinov2_custom.layers.layer_scale import LayerScale
from dinov2_custom.layers.mlp import Mlp
from dinov2_custom.layers.patch_embed import PatchEmbed
from dinov2_custom.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNAligned, SwiGLUFFNFused
