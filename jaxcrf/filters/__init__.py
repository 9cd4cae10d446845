"""Linear filters over pixels, `q ↦ K q`: immutable pytrees, built once per image.

Every filter has an exact transpose `K.T`, its `K.diagonal()`, a static `K.is_symmetric`, four
normalisations `K.normalized(kind)`, and can be added to another: `K1 + K2`.
"""

from jaxcrf.filters.base import Diagonal as Diagonal
from jaxcrf.filters.base import Filter as Filter
from jaxcrf.filters.base import LinearOperator as LinearOperator
from jaxcrf.filters.base import PixelLabelOperator as PixelLabelOperator
from jaxcrf.filters.base import Sum as Sum
from jaxcrf.filters.dense import Dense as Dense
from jaxcrf.filters.gram import Gram as Gram
from jaxcrf.filters.grid import Grid as Grid
from jaxcrf.filters.landmark import Landmark as Landmark
from jaxcrf.filters.lattice import Lattice as Lattice
from jaxcrf.filters.selection import fully_connected as fully_connected
from jaxcrf.filters.selection import select_filter as select_filter
from jaxcrf.filters.separable import Separable as Separable
from jaxcrf.filters.window import Window as Window
