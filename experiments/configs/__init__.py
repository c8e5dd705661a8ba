"""One module per experiment, with its question, command and expected result; `EXPERIMENTS` names them."""

import experiments.images  # noqa: F401  registers the image sets
from experiments.configs import (
    cifar10,
    digits,
    digits_encoder,
    fashion_mnist,
    fashion_mnist_encoder,
    file,
    mnist,
    mnist_encoder,
    newsgroups,
    scrna,
    synthetic,
    usps,
    usps_encoder,
)

EXPERIMENTS = {
    module.__name__.rsplit(".", 1)[1]: module.CONFIG
    for module in (
        *(digits, digits_encoder, synthetic, mnist, mnist_encoder, fashion_mnist, fashion_mnist_encoder, cifar10),
        *(usps, usps_encoder, newsgroups, scrna, file),
    )
}
