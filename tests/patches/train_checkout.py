"""Train a checkout on a CPU: python train_checkout.py <arguments of its train.py>, from the checkout's folder.

Prints where ``dinov2`` and ``dinov2_custom`` came from, then calls the checkout's own ``main``.
"""

import sys
import warnings

from tests.patches import stand_ins

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.modules.update(stand_ins.modules())
    import dinov2

    import dinov2_custom

    print("dinov2:", dinov2.__file__)
    print("dinov2_custom:", dinov2_custom.__file__)
    import dinov2.train

    stand_ins.adapt_to_cpu()
    if dinov2.train.main.__module__ != "dinov2.train.train":
        sys.exit(f"not the checkout's own training: {dinov2.train.main.__module__}")
    dinov2.train.main(dinov2.train.get_args_parser().parse_args())
