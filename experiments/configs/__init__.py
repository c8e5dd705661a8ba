"""One module per experiment, with its question, command and expected result; `EXPERIMENTS` names them."""

from experiments.configs import cifar10, digits, fashion_mnist, file, mnist, newsgroups, scrna, synthetic, usps

EXPERIMENTS = {
    module.__name__.rsplit(".", 1)[1]: module.CONFIG
    for module in (digits, synthetic, mnist, fashion_mnist, cifar10, usps, newsgroups, scrna, file)
}
