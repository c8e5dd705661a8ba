"""Label-preserving distortions of images, drawn on the device within the training step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random distortions of images in training by gradients; drawn again in every step, on the device.

    Example:
        >>> Augmentation(shift=2.0, rotation=15.0).is_on
        True
    """

    shift: float = 0.0
    """Pixels up, down, left or right at most."""
    rotation: float = 0.0
    """Degrees at most, either way."""
    scale: float = 0.0
    """Share by which images grow or shrink at most."""
    mirror: bool = False
    """Swap left and right in half of the images."""

    def __post_init__(self) -> None:
        if not (self.shift >= 0 and self.rotation >= 0 and 0 <= self.scale < 1):
            raise ValueError(
                "Augmentation: `shift` and `rotation` must be at least 0 and `scale` in [0, 1); got "
                f"{self.shift}, {self.rotation} and {self.scale}. Use 0 for none."
            )

    @property
    def is_on(self) -> bool:
        """True if there is any."""
        return self.shift > 0 or self.rotation > 0 or self.scale > 0 or self.mirror


def distort(key: jax.Array, rows: jax.Array, image_shape: tuple[int, ...], options: Augmentation) -> jax.Array:
    """Rows (B, D) that are images, each shifted, rotated, scaled and mirrored at random; what comes into view is 0.

    Args:
        key: PRNG key; what happens to a row follows from it and the row's number.
        rows: images as rows.
        image_shape: (height, width) or (height, width, channels) with product D.
        options: sizes of the distortions.

    Returns:
        The distorted rows (B, D), bilinearly interpolated.
    """
    height, width, *_ = image_shape
    images = rows.reshape(rows.shape[0], height, width, -1)
    shift_key, angle_key, scale_key, mirror_key = jax.random.split(key, 4)
    count = images.shape[0]
    if options.mirror:
        is_mirrored = jax.random.bernoulli(mirror_key, shape=(count, 1, 1, 1))
        images = jnp.where(is_mirrored, images[:, :, ::-1], images)
    shift = options.shift * jax.random.uniform(shift_key, (count, 2), minval=-1)
    angle = jnp.radians(options.rotation) * jax.random.uniform(angle_key, (count,), minval=-1)
    scale = 1 + options.scale * jax.random.uniform(scale_key, (count,), minval=-1)
    # where each pixel comes from: rotated and scaled about the centre, then shifted
    y, x = jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2
    cos, sin = (jnp.cos(angle) / scale)[:, None, None], (jnp.sin(angle) / scale)[:, None, None]
    y, x = y[None, :, None], x[None, None, :]
    from_y = cos * y + sin * x + (height - 1) / 2 + shift[:, 0, None, None]
    from_x = cos * x - sin * y + (width - 1) / 2 + shift[:, 1, None, None]
    return jax.vmap(_sample)(images, from_y, from_x).reshape(rows.shape)


def _sample(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """An image (H, W, C) at positions (H, W), bilinearly; 0 outside."""
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    y, x = (jnp.clip(at + 1, 0, size - 1.001) for at, size in zip((y, x), padded.shape[:2], strict=True))
    top, left = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
    down, right = (y - top)[..., None], (x - left)[..., None]
    above = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    below = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    return above * (1 - down) + below * down
