"""The Vision Transformer of DINOv2: class token, optional registers, masks, several crop sizes in one pass.

Single-device code without precision, compilation or parallelism. Names of parameters and methods are upstream's, so
released weights and users' scripts work. Every module is called, except those of blocks in a training step that
:meth:`DinoVisionTransformer.forward_features_list` computes from their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from dinov2_custom.layers import MemEffAttention, PatchEmbed
from dinov2_custom.layers.block import Block, BlockChunk, NestedTensorBlock, call_block, has_own_forward, of_tensor
from dinov2_custom.layers.drop_path import Draw, to_subsets
from dinov2_custom.layers.packed import Packed
from dinov2_custom.layers.residual import Owned
from dinov2_custom.layers.segments import pack, unpack
from dinov2_custom.layers.unmodified import find_change, find_change_of_all
from dinov2_custom.models.pos_embed import resample_pos_embed
from dinov2_custom.models.stacking import FFN_LAYERS, chunk_blocks, drop_path_rates, init_weights_vit_timm, named_apply


class DinoVisionTransformer(nn.Module):
    """A ViT whose tokens are [class, registers, patches].

    Args:
        img_size: side, or (height, width), in pixels for which ``pos_embed`` is sized; other sizes are resampled.
        init_values: initial value of LayerScale; None or 0 for none.
        ffn_layer: one of :data:`FFN_LAYERS`.
        block_chunks: 0 for a flat block list; n > 0 for n chunks (changes only the parameters' names).
        num_register_tokens: extra tokens without a position embedding (Darcet et al. 2023).
        interpolate_antialias, interpolate_offset: how ``pos_embed`` is resampled; the released plain models use
            False and 0.1, those with registers True and 0.0.
        channel_adaptive: for ``in_chans`` 1: :meth:`get_intermediate_layers` takes images of any number of channels,
            each channel as an image (attribute ``bag_of_channels``).

    Raises:
        ValueError: unknown ``ffn_layer``, or more chunks than blocks.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | Tensor | None = None,
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        block_fn: Callable[..., nn.Module] = Block,
        ffn_layer: str = "mlp",
        block_chunks: int = 1,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        channel_adaptive: bool = False,
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise ValueError(f"ffn_layer: expected one of {sorted(FFN_LAYERS)}, got {ffn_layer!r}")
        if block_chunks > depth:
            raise ValueError(f"block_chunks: expected at most the depth {depth}, got {block_chunks}")
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.num_features = self.embed_dim = embed_dim
        self.num_tokens = 1
        self.n_blocks = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.bag_of_channels = channel_adaptive

        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + self.num_tokens, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        make_block = partial(
            block_fn,
            dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            ffn_bias=ffn_bias,
            norm_layer=norm_layer,
            act_layer=act_layer,
            ffn_layer=FFN_LAYERS[ffn_layer],
            init_values=init_values,
        )
        blocks = [make_block(drop_path=rate) for rate in drop_path_rates(depth, drop_path_rate, drop_path_uniform)]
        self.chunked_blocks = block_chunks > 0
        self.blocks = nn.ModuleList(chunk_blocks(blocks, block_chunks) if self.chunked_blocks else blocks)
        self.norm = norm_layer(embed_dim)
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Draw tokens and linear layers by truncated normal; LayerScale and patch embedding use their own defaults."""
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        named_apply(init_weights_vit_timm, self)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients down to a total norm of at most ``max_norm``; return the original norm. FSDP's name."""
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm, norm_type)

    def all_blocks(self) -> list[nn.Module]:
        """Return the transformer blocks in order, chunked or not."""
        if not self.chunked_blocks:
            return list(self.blocks)
        blocks, places = [], 0
        for stage in self.blocks:
            if isinstance(stage, nn.ModuleList):
                blocks += list(stage)[places:]  # skip the chunk's padding; an Identity in place of a block is kept
                places = len(stage)
            else:
                blocks.append(stage)
        return blocks

    def draw(self, num_sequences: Sequence[int], generator: torch.Generator | None = None) -> list[Draw]:
        """Draw the stochastic-depth subsets of one pass over tensors of ``num_sequences``, two per block, in order.

        ``generator`` is a CPU generator (None: torch's global one). Blocks with a ``forward`` of their own make their
        own draws.
        """
        drawn = [b.draw(num_sequences, generator) if has_own_forward(b) else (None, None) for b in self.all_blocks()]
        return [draw for pair in drawn for draw in pair]

    def num_tokens_of(self, x: Tensor) -> int:
        """Return how many tokens an image of (..., H, W) becomes."""
        rows, columns = (side // self.patch_size for side in x.shape[-2:])
        return self.num_tokens + self.num_register_tokens + rows * columns

    def position_grid(self) -> tuple[int, int]:
        """Return (rows, columns) of the patch grid of ``pos_embed``: that of ``img_size``, else a square.

        ``pos_embed`` may have been replaced by one for another, square grid, and ``embed_layer`` may have no grid
        attribute.
        """
        num_positions = self.pos_embed.shape[1] - self.num_tokens
        rows, columns = getattr(self.patch_embed, "patches_resolution", (0, 0))
        return (rows, columns) if rows * columns == num_positions else (math.isqrt(num_positions),) * 2

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Return ``pos_embed`` (1, 1+n, D) for tokens ``x`` (B, 1+n, D) of an image ``w`` pixels high and ``h`` wide.

        The argument names are upstream's: ``w`` is the image's height.
        """
        grid, own_grid = (w // self.patch_size, h // self.patch_size), self.position_grid()
        if grid == own_grid and (w == h or own_grid[0] != own_grid[1]):  # as upstream for sizes between multiples
            return self.pos_embed
        return resample_pos_embed(
            self.pos_embed,
            grid,
            source_grid=own_grid,
            antialias=self.interpolate_antialias,
            offset=self.interpolate_offset,
        ).to(x.dtype)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, 1+R+N, D); patches under ``masks`` (B, N) become the mask token."""
        height, width = x.shape[-2:]
        tokens = self.patch_embed(x).to(self.pos_embed.dtype)
        if masks is not None:
            tokens = torch.where(masks.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        tokens = tokens + self.interpolate_pos_encoding(tokens, height, width)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(tokens.shape[0], -1, -1)
            tokens = torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)
        return tokens

    def forward_features_list(
        self,
        x_list: Sequence[Tensor],
        masks_list: Sequence[Tensor | None],
        draws: Sequence[Draw] | None = None,
        packed: Packed = Packed(),  # noqa: B008 - immutable
    ) -> list[dict[str, Tensor | None]]:
        """Run crops of several sizes through the blocks.

        Args:
            x_list: images, each (B_i, C, H_i, W_i).
            masks_list: (B_i, N_i) bool or None, each.
            draws: the stochastic-depth subsets, as :meth:`draw` returns them, cut to ``x_list``; None: draw them here.
            packed: which blocks process all crops in one pass from their weights; the others are called once per
                tensor.

        Returns:
            One dict per tensor: ``x_norm_clstoken`` (B, D), ``x_norm_regtokens`` (B, R, D), ``x_norm_patchtokens``
            (B, N, D), ``x_prenorm`` (B, 1+R+N, D), ``masks`` as given.
        """
        tokens = [self.prepare_tokens_with_masks(*pair) for pair in zip(x_list, masks_list, strict=True)]
        draws = draws or self.draw([x.shape[0] for x in x_list])
        drawn = {block: draws[2 * index : 2 * index + 2] for index, block in enumerate(self.all_blocks())}
        for blocks in self._runs(packed.blocks):
            if blocks[0] in packed.blocks:
                tokens = _run_packed(blocks, tokens, [drawn[block] for block in blocks], packed)
                continue
            (block,) = blocks  # a single block or a chunk
            of_block = drawn.get(block, (None, None))
            tokens = [call_block(block, x, of_tensor(of_block, i), packed.recompute) for i, x in enumerate(tokens)]
        normed = [self.norm(x) for x in tokens]
        return [self._features(*parts) for parts in zip(normed, tokens, masks_list, strict=True)]

    def _runs(self, packed: frozenset[nn.Module]) -> list[list[nn.Module]]:
        """Return the blocks in order, with consecutive blocks in ``packed`` grouped, and chunks in place of their
        blocks if they are hooked or replaced."""
        whole = not self.chunked_blocks or find_change_of_all() is not None
        runs: list[list[nn.Module]] = []
        for stage in self.blocks:
            closed = whole or find_change(stage, (BlockChunk,)) is not None
            for block in [stage] if closed else [block for block in stage if not isinstance(block, nn.Identity)]:
                if runs and block in packed and runs[-1][0] in packed:
                    runs[-1].append(block)
                else:
                    runs.append([block])
        return runs

    def _features(self, norm: Tensor, prenorm: Tensor, masks: Tensor | None) -> dict[str, Tensor | None]:
        first_patch = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": norm[:, 0],
            "x_norm_regtokens": norm[:, 1:first_patch],
            "x_norm_patchtokens": norm[:, first_patch:],
            "x_prenorm": prenorm,
            "masks": masks,
        }

    def forward_features(self, x, masks=None, **options):
        """Return the feature dict of (B, C, H, W), or a list of dicts for a list of image tensors.

        ``options``: of :meth:`forward_features_list`.
        """
        if isinstance(x, list | tuple):
            return self.forward_features_list(x, masks if masks is not None else [None] * len(x), **options)
        if options:
            return self.forward_features_list([x], [masks], **options)[0]
        tokens = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            tokens = block(tokens)
        return self._features(self.norm(tokens), tokens, masks)

    def _get_intermediate_layers_not_chunked(self, x: Tensor, n: int | Sequence[int] = 1) -> list[Tensor]:
        """Return the tokens (B, 1+R+N, D) after the blocks that ``n`` names, in order of depth, before the final norm.

        Raises:
            ValueError: a block index that does not exist, or is given twice.
        """
        tokens = self.prepare_tokens_with_masks(x)
        blocks = self.all_blocks()  # users truncate models: `model.blocks = model.blocks[:6]`
        wanted = range(len(blocks) - n, len(blocks)) if isinstance(n, int) else n
        outputs = []
        for index, block in enumerate(blocks):
            tokens = block(tokens)
            if index in wanted:
                outputs.append(tokens)
        if len(outputs) != len(wanted):
            raise ValueError(f"n: expected block indices within 0..{len(blocks) - 1}, each once, got {list(wanted)}")
        return outputs

    _get_intermediate_layers_chunked = _get_intermediate_layers_not_chunked

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Return patch features of some blocks: (B, N, D) each, or (B, D, h, w) with ``reshape``.

        Args:
            n: an int for the last n blocks, or block indices; the result is in order of depth.
            return_class_token: return (patches, class token (B, D)) pairs.
            norm: apply the final norm.

        Returns:
            One entry per block. A bag of channels always returns pairs: for an image (B, C, H, W), patches (B, C, N,
            D), with ``reshape`` (B, C, D, h, w), and the channels' class tokens concatenated (B, C * D).

        Raises:
            ValueError: a block index that does not exist.
        """
        channels = x.shape[1]
        if self.bag_of_channels:
            x = x.flatten(0, 1).unsqueeze(1)
        chunked = self._get_intermediate_layers_chunked
        outputs = chunked(x, n) if self.chunked_blocks else self._get_intermediate_layers_not_chunked(x, n)
        if norm:
            outputs = [self.norm(out) for out in outputs]
        class_tokens = [out[:, 0] for out in outputs]
        patches = [out[:, 1 + self.num_register_tokens :] for out in outputs]
        if reshape:
            rows, columns = (side // self.patch_size for side in x.shape[-2:])
            patches = [p.transpose(1, 2).reshape(x.shape[0], -1, rows, columns).contiguous() for p in patches]
        if self.bag_of_channels:
            patches = [p.unflatten(0, (-1, channels)) for p in patches]
            class_tokens = [c.unflatten(0, (-1, channels)).flatten(1) for c in class_tokens]
        pairs = return_class_token or self.bag_of_channels
        return tuple(zip(patches, class_tokens, strict=True)) if pairs else tuple(patches)

    def forward(self, x, masks=None, is_training: bool = False, **options):
        """Return class features (B, D), or with ``is_training`` the dict(s) of :meth:`forward_features`."""
        features = self.forward_features(x, masks, **options)
        if is_training:
            return features
        parts = features if isinstance(features, list) else [features]
        outputs = [self.head(one["x_norm_clstoken"]) for one in parts]
        return outputs if isinstance(features, list) else outputs[0]


def _run_packed(
    blocks: list[nn.Module], tokens: list[Tensor], draws: list[Sequence[Draw]], packed: Packed
) -> list[Tensor]:
    """Run blocks in order, each on all of ``tokens`` at once."""
    x_TD, segments = pack(tokens)
    subsets = to_subsets([draw for pair in draws for draw in pair], segments, x_TD.device)
    for index, block in enumerate(blocks):
        own, following = subsets[2 * index : 2 * index + 2], subsets[2 * index + 2 : 2 * index + 3]
        owned = Owned(index > 0, bool(following) and following[0].rows is not None)
        x_TD = block.forward_packed(x_TD, own, owned, packed.recompute, packed.pieces)
    return unpack(x_TD, segments)


def _vit(
    embed_dim: int,
    depth: int,
    num_heads: int,
    patch_size: int,
    num_register_tokens: int,
    in_chans: int,
    channel_adaptive: bool,
    kwargs: dict,
):
    return DinoVisionTransformer(
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=4,
        block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
        num_register_tokens=num_register_tokens,
        channel_adaptive=channel_adaptive,
        **kwargs,
    )


def vit_nano(
    patch_size: int = 16, num_register_tokens: int = 0, in_chans: int = 3, channel_adaptive: bool = False, **kwargs
) -> DinoVisionTransformer:
    """Width 64, 4 blocks, 1 head: for tests."""
    return _vit(64, 4, 1, patch_size, num_register_tokens, in_chans, channel_adaptive, kwargs)


def vit_micro(
    patch_size: int = 16, num_register_tokens: int = 0, in_chans: int = 3, channel_adaptive: bool = False, **kwargs
) -> DinoVisionTransformer:
    """Width 128, 6 blocks, 2 heads: for laptops."""
    return _vit(128, 6, 2, patch_size, num_register_tokens, in_chans, channel_adaptive, kwargs)


def vit_tiny(
    patch_size: int = 16, num_register_tokens: int = 0, in_chans: int = 3, channel_adaptive: bool = False, **kwargs
) -> DinoVisionTransformer:
    """Width 192, 12 blocks, 3 heads."""
    return _vit(192, 12, 3, patch_size, num_register_tokens, in_chans, channel_adaptive, kwargs)


def vit_small(
    patch_size: int = 16, num_register_tokens: int = 0, in_chans: int = 3, channel_adaptive: bool = False, **kwargs
) -> DinoVisionTransformer:
    """Width 384, 12 blocks, 6 heads."""
    return _vit(384, 12, 6, patch_size, num_register_tokens, in_chans, channel_adaptive, kwargs)


def vit_base(
    patch_size: int = 16, num_register_tokens: int = 0, in_chans: int = 3, channel_adaptive: bool = False, **kwargs
) -> DinoVisionTransformer:
    """Width 768, 12 blocks, 12 heads."""
    return _vit(768, 12, 12, patch_size, num_register_tokens, in_chans, channel_adaptive, kwargs)


def vit_large(
    patch_size: int = 16, num_register_tokens: int = 0, in_chans: int = 3, channel_adaptive: bool = False, **kwargs
) -> DinoVisionTransformer:
    """Width 1024, 24 blocks, 16 heads."""
    return _vit(1024, 24, 16, patch_size, num_register_tokens, in_chans, channel_adaptive, kwargs)


def vit_giant2(
    patch_size: int = 16, num_register_tokens: int = 0, in_chans: int = 3, channel_adaptive: bool = False, **kwargs
) -> DinoVisionTransformer:
    """Width 1536, 40 blocks, 24 heads of 64."""
    return _vit(1536, 40, 24, patch_size, num_register_tokens, in_chans, channel_adaptive, kwargs)


ARCHITECTURES = ("vit_nano", "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2")
