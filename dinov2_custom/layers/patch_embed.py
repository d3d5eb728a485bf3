"""Images to patch tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def make_2tuple(value: int | tuple[int, int]) -> tuple[int, int]:
    """Return (value, value), or a pair unchanged."""
    if isinstance(value, int):
        return (value, value)
    height, width = value
    return (height, width)


class PatchEmbed(nn.Module):
    """Split images (B, C, H, W) into patches and project each: (B, N, D), or (B, h, w, D) when not flattened.

    The convolution's kernel equals its stride, so it is one linear layer per patch; parameters are named as in released
    weights.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = make_2tuple(img_size)
        self.patch_size = make_2tuple(patch_size)
        self.patches_resolution = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans, self.embed_dim, self.flatten_embedding = in_chans, embed_dim, flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches.

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        for side, patch, name in zip(x.shape[-2:], self.patch_size, ("height", "width"), strict=True):
            if side % patch:
                raise ValueError(
                    f"image {name}: expected a multiple of the patch size {patch}, got {side}; "
                    f"resize to {side // patch * patch} or {-(-side // patch) * patch}"
                )
        patches = self.proj(x)
        tokens = self.norm(patches.flatten(2).transpose(1, 2))
        return tokens if self.flatten_embedding else tokens.unflatten(1, patches.shape[-2:])

    def flops(self) -> int:
        """Return the multiply-adds of one image of ``img_size``."""
        patch_area = self.patch_size[0] * self.patch_size[1]
        norm = 0 if isinstance(self.norm, nn.Identity) else self.embed_dim
        return self.num_patches * (self.embed_dim * self.in_chans * patch_area + norm)
