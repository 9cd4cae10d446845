r"""The package pydensecrf, without its compiler: the same names and results, from JAX.

A script migrates by its imports alone::

    import jaxcrf.compat.pydensecrf.densecrf as dcrf  # was: import pydensecrf.densecrf as dcrf
    from jaxcrf.compat.pydensecrf.utils import unary_from_softmax

A program that cannot be edited, because the import sits in somebody else's package, sees this one under the
old names once these lines have run::

    import sys
    import jaxcrf.compat.pydensecrf as pydensecrf

    sys.modules["pydensecrf"] = pydensecrf
    sys.modules["pydensecrf.densecrf"] = pydensecrf.densecrf
    sys.modules["pydensecrf.utils"] = pydensecrf.utils

What stays: label maps are labels-first, `(labels, height * width)`, with pixel `(x, y)` at `y * width + x`;
compatibilities have the original's signs; kernels are filtered on the permutohedral lattice, every pixel takes
part in its own message, and features are compared in the order they are given in, which the lattice notices.

What differs, always to the better known outcome:

- Any array-like of numbers is taken, where the original wants C-contiguous float32 or uint8.
- Maps come back as NumPy arrays, float32 and writable, where the original has a buffer that only `np.array`
  can read. There is therefore no module `eigen`: pass NumPy arrays.
- Sizes, types, NaN and bandwidths are checked, and the error names the argument; the original aborts,
  reads beyond its arrays or returns numbers without meaning. Unary energies have to be set before inference.
- A `Unary` may be given to several CRFs; the original hands over its memory.

Example:
    >>> import numpy as np
    >>> import jaxcrf.compat.pydensecrf as pydensecrf
    >>> labels = np.array([[1, 1, 1, 1], [1, 2, 1, 1], [1, 1, 1, 1]])
    >>> crf = pydensecrf.densecrf.DenseCRF2D(4, 3, 2)
    >>> crf.setUnaryEnergy(pydensecrf.utils.unary_from_labels(labels, 2, gt_prob=0.6))
    >>> crf.addPairwiseGaussian(sxy=3, compat=3)
    >>> np.argmax(crf.inference(5), axis=0).reshape(3, 4)
    array([[0, 0, 0, 0],
           [0, 0, 0, 0],
           [0, 0, 0, 0]])

References:
    Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*,
    2011, algorithm 1.
"""

from jaxcrf.compat.pydensecrf import densecrf as densecrf
from jaxcrf.compat.pydensecrf import utils as utils
