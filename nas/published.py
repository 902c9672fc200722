"""Published genotypes of convolutional cells, to retrain, to count and to compare with.

The NASNet, AmoebaNet and ENAS cells are given in the operations of DARTS and for its skeleton, approximately.
"""

from nas.genotype import Genotype

PUBLISHED: dict[str, Genotype] = {
    # First order. Liu et al., "DARTS: Differentiable Architecture Search", arXiv:1806.09055.
    "DARTS_V1": Genotype.parse(
        """Genotype(
            normal=[
                ('sep_conv_3x3', 1), ('sep_conv_3x3', 0),
                ('skip_connect', 0), ('sep_conv_3x3', 1),
                ('skip_connect', 0), ('sep_conv_3x3', 1),
                ('sep_conv_3x3', 0), ('skip_connect', 2),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('max_pool_3x3', 0), ('max_pool_3x3', 1),
                ('skip_connect', 2), ('max_pool_3x3', 0),
                ('max_pool_3x3', 0), ('skip_connect', 2),
                ('skip_connect', 2), ('avg_pool_3x3', 0),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # Second order. The same paper.
    "DARTS_V2": Genotype.parse(
        """Genotype(
            normal=[
                ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
                ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
                ('sep_conv_3x3', 1), ('skip_connect', 0),
                ('skip_connect', 0), ('dil_conv_3x3', 2),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('max_pool_3x3', 0), ('max_pool_3x3', 1),
                ('skip_connect', 2), ('max_pool_3x3', 1),
                ('max_pool_3x3', 0), ('skip_connect', 2),
                ('skip_connect', 2), ('max_pool_3x3', 1),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # Searched on CIFAR-10. Xu et al., "PC-DARTS: Partial Channel Connections ...", arXiv:1907.05737.
    "PC_DARTS_cifar": Genotype.parse(
        """Genotype(
            normal=[
                ('sep_conv_3x3', 1), ('skip_connect', 0),
                ('sep_conv_3x3', 0), ('dil_conv_3x3', 1),
                ('sep_conv_5x5', 0), ('sep_conv_3x3', 1),
                ('avg_pool_3x3', 0), ('dil_conv_3x3', 1),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('sep_conv_5x5', 1), ('max_pool_3x3', 0),
                ('sep_conv_5x5', 1), ('sep_conv_5x5', 2),
                ('sep_conv_3x3', 0), ('sep_conv_3x3', 3),
                ('sep_conv_3x3', 1), ('sep_conv_3x3', 2),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # Searched on ImageNet. The same paper.
    "PC_DARTS_image": Genotype.parse(
        """Genotype(
            normal=[
                ('skip_connect', 1), ('sep_conv_3x3', 0),
                ('sep_conv_3x3', 0), ('skip_connect', 1),
                ('sep_conv_3x3', 1), ('sep_conv_3x3', 3),
                ('sep_conv_3x3', 1), ('dil_conv_5x5', 4),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('sep_conv_3x3', 0), ('skip_connect', 1),
                ('dil_conv_5x5', 2), ('max_pool_3x3', 1),
                ('sep_conv_3x3', 2), ('sep_conv_3x3', 1),
                ('sep_conv_5x5', 0), ('sep_conv_3x3', 3),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # Chen et al., "Progressive Differentiable Architecture Search", arXiv:1904.12760; one CIFAR-10 run, not
    # the cell of the paper's figure.
    "PDARTS": Genotype.parse(
        """Genotype(
            normal=[
                ('skip_connect', 0), ('dil_conv_3x3', 1),
                ('skip_connect', 0), ('sep_conv_3x3', 1),
                ('sep_conv_3x3', 1), ('sep_conv_3x3', 3),
                ('sep_conv_3x3', 0), ('dil_conv_5x5', 4),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('avg_pool_3x3', 0), ('sep_conv_5x5', 1),
                ('sep_conv_3x3', 0), ('dil_conv_5x5', 2),
                ('max_pool_3x3', 0), ('dil_conv_3x3', 1),
                ('dil_conv_3x3', 1), ('dil_conv_5x5', 3),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # Dong & Yang, "Searching for a Robust Neural Architecture in Four GPU Hours", arXiv:1910.04465.
    "GDAS_V1": Genotype.parse(
        """Genotype(
            normal=[
                ('skip_connect', 0), ('skip_connect', 1),
                ('skip_connect', 0), ('sep_conv_5x5', 2),
                ('sep_conv_3x3', 3), ('skip_connect', 0),
                ('sep_conv_5x5', 4), ('sep_conv_3x3', 3),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('sep_conv_5x5', 0), ('sep_conv_3x3', 1),
                ('sep_conv_5x5', 2), ('sep_conv_5x5', 1),
                ('dil_conv_5x5', 2), ('sep_conv_3x3', 1),
                ('sep_conv_5x5', 0), ('sep_conv_5x5', 1),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # The same paper, with the fixed reduction cell.
    "GDAS_F1": Genotype.parse(
        """Genotype(
            normal=[
                ('skip_connect', 0), ('skip_connect', 1),
                ('skip_connect', 0), ('sep_conv_3x3', 2),
                ('skip_connect', 0), ('sep_conv_3x3', 2),
                ('skip_connect', 0), ('sep_conv_3x3', 2),
            ],
            normal_concat=range(2, 6),
            reduce=[
                [('conv_1x3_3x1', 0)], [('conv_1x3_3x1', 1)],
                [('max_pool_3x3_bn', 0)], [('max_pool_3x3_bn', 1)],
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # By strength of the resource constraint. Xie et al., "SNAS: Stochastic Neural Architecture Search",
    # arXiv:1812.09926.
    "SNAS_mild": Genotype.parse(
        """Genotype(
            normal=[
                ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
                ('skip_connect', 0), ('dil_conv_3x3', 1),
                ('skip_connect', 0), ('skip_connect', 1),
                ('skip_connect', 0), ('sep_conv_3x3', 1),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('max_pool_3x3', 0), ('max_pool_3x3', 1),
                ('max_pool_3x3', 1), ('skip_connect', 2),
                ('max_pool_3x3', 1), ('skip_connect', 2),
                ('max_pool_3x3', 0), ('dil_conv_5x5', 2),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # The same paper.
    "SNAS_moderate": Genotype.parse(
        """Genotype(
            normal=[
                ('dil_conv_5x5', 0), ('skip_connect', 1),
                ('sep_conv_3x3', 0), ('skip_connect', 1),
                ('skip_connect', 0), ('skip_connect', 1),
                ('sep_conv_3x3', 0), ('dil_conv_5x5', 1),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('max_pool_3x3', 0), ('max_pool_3x3', 1),
                ('sep_conv_5x5', 0), ('dil_conv_5x5', 1),
                ('sep_conv_5x5', 0), ('sep_conv_5x5', 1),
                ('sep_conv_5x5', 0), ('sep_conv_5x5', 1),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # The same paper; the reduction cell keeps `none`.
    "SNAS_aggressive": Genotype.parse(
        """Genotype(
            normal=[
                ('sep_conv_5x5', 0), ('skip_connect', 1),
                ('skip_connect', 0), ('skip_connect', 1),
                ('dil_conv_5x5', 1), ('skip_connect', 0),
                ('skip_connect', 0), ('dil_conv_5x5', 1),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('sep_conv_5x5', 0), ('none', 1),
                ('sep_conv_5x5', 0), ('none', 1),
                ('none', 1), ('none', 0),
                ('none', 1), ('none', 0),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
    # Zoph et al., "Learning Transferable Architectures ...", arXiv:1707.07012, as written in the code of
    # DARTS.
    "NASNet": Genotype.parse(
        """Genotype(
            normal=[
                ('sep_conv_5x5', 1), ('sep_conv_3x3', 0),
                ('sep_conv_5x5', 0), ('sep_conv_3x3', 0),
                ('avg_pool_3x3', 1), ('skip_connect', 0),
                ('avg_pool_3x3', 0), ('avg_pool_3x3', 0),
                ('sep_conv_3x3', 1), ('skip_connect', 1),
            ],
            normal_concat=range(2, 7),
            reduce=[
                ('sep_conv_5x5', 1), ('sep_conv_7x7', 0),
                ('max_pool_3x3', 1), ('sep_conv_7x7', 0),
                ('avg_pool_3x3', 1), ('sep_conv_5x5', 0),
                ('skip_connect', 3), ('avg_pool_3x3', 2),
                ('sep_conv_3x3', 2), ('max_pool_3x3', 1),
            ],
            reduce_concat=range(4, 7),
        )"""
    ),
    # Real et al., "Regularized Evolution for Image Classifier Architecture Search", arXiv:1802.01548,
    # likewise.
    "AmoebaNet": Genotype.parse(
        """Genotype(
            normal=[
                ('avg_pool_3x3', 0), ('max_pool_3x3', 1),
                ('sep_conv_3x3', 0), ('sep_conv_5x5', 2),
                ('sep_conv_3x3', 0), ('avg_pool_3x3', 3),
                ('sep_conv_3x3', 1), ('skip_connect', 1),
                ('skip_connect', 0), ('avg_pool_3x3', 1),
            ],
            normal_concat=range(4, 7),
            reduce=[
                ('avg_pool_3x3', 0), ('sep_conv_3x3', 1),
                ('max_pool_3x3', 0), ('sep_conv_7x7', 2),
                ('sep_conv_7x7', 0), ('avg_pool_3x3', 1),
                ('max_pool_3x3', 0), ('max_pool_3x3', 1),
                ('conv_7x1_1x7', 0), ('sep_conv_3x3', 5),
            ],
            reduce_concat=[3, 4, 6],
        )"""
    ),
    # Pham et al., "Efficient Neural Architecture Search via Parameter Sharing", arXiv:1802.03268: the cell in
    # the authors' code.
    "ENAS": Genotype.parse(
        """Genotype(
            normal=[
                ('avg_pool_3x3', 0), ('sep_conv_3x3', 0),
                ('skip_connect', 0), ('sep_conv_5x5', 0),
                ('skip_connect', 0), ('sep_conv_5x5', 1),
                ('sep_conv_3x3', 1), ('sep_conv_5x5', 0),
                ('avg_pool_3x3', 0), ('sep_conv_5x5', 1),
            ],
            normal_concat=range(2, 7),
            reduce=[
                ('sep_conv_3x3', 1), ('sep_conv_3x3', 1),
                ('max_pool_3x3', 0), ('avg_pool_3x3', 0),
                ('sep_conv_5x5', 1), ('sep_conv_5x5', 3),
                ('sep_conv_3x3', 1), ('skip_connect', 0),
                ('max_pool_3x3', 0), ('sep_conv_5x5', 1),
            ],
            reduce_concat=[2, 4, 5, 6],
        )"""
    ),
    # The same paper: the cell of its figure, as written in the code of GDAS.
    "ENASNet": Genotype.parse(
        """Genotype(
            normal=[
                ('sep_conv_3x3', 1), ('skip_connect', 1),
                ('sep_conv_5x5', 1), ('skip_connect', 0),
                ('avg_pool_3x3', 0), ('sep_conv_3x3', 1),
                ('sep_conv_3x3', 0), ('avg_pool_3x3', 1),
                ('sep_conv_5x5', 1), ('avg_pool_3x3', 0),
            ],
            normal_concat=range(2, 7),
            reduce=[
                ('sep_conv_5x5', 0), ('sep_conv_3x3', 1),
                ('sep_conv_3x3', 1), ('avg_pool_3x3', 1),
                ('sep_conv_3x3', 1), ('avg_pool_3x3', 1),
                ('avg_pool_3x3', 1), ('sep_conv_5x5', 4),
                ('sep_conv_3x3', 5), ('sep_conv_5x5', 0),
            ],
            reduce_concat=range(2, 7),
        )"""
    ),
    # Seed 0. Wang et al., "Rethinking Architecture Selection in Differentiable NAS", arXiv:2108.04392.
    "DARTS_PT": Genotype.parse(
        """Genotype(
            normal=[
                ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
                ('sep_conv_5x5', 0), ('dil_conv_3x3', 1),
                ('skip_connect', 0), ('skip_connect', 2),
                ('skip_connect', 0), ('max_pool_3x3', 4),
            ],
            normal_concat=range(2, 6),
            reduce=[
                ('sep_conv_3x3', 0), ('avg_pool_3x3', 1),
                ('dil_conv_5x5', 1), ('dil_conv_3x3', 2),
                ('avg_pool_3x3', 0), ('max_pool_3x3', 2),
                ('sep_conv_3x3', 2), ('skip_connect', 4),
            ],
            reduce_concat=range(2, 6),
        )"""
    ),
}
"""Genotypes by the names under which the authors' code lists them."""
