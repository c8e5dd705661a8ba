"""One module per experiment, with its question, command and expected result; `EXPERIMENTS` names them and presets."""

import experiments.images  # noqa: F401  registers the image sets
from experiments.configs import (
    cifar10,
    digits_encoder,
    fashion_mnist,
    fashion_mnist_encoder,
    mnist,
    mnist_encoder,
    newsgroups,
    scrna,
    usps,
    usps_encoder,
)
from flax_hmog.recipe.presets import PRESETS

EXPERIMENTS = PRESETS | {
    module.__name__.rsplit(".", 1)[1]: module.CONFIG
    for module in (
        *(digits_encoder, mnist, mnist_encoder, fashion_mnist, fashion_mnist_encoder, cifar10),
        *(usps, usps_encoder, newsgroups, scrna),
    )
}
