"""Pictures: overlays, side-by-side grids, what a refinement changed, pairwise terms, confusions and curves.

Figures are made without pyplot: nothing is global, nothing needs a display, and nothing has to be closed.
Show one in a notebook by making it the last value of a cell, or store it with `save_figure`.
"""

from jaxcrf.plots.curves import compatibility as compatibility
from jaxcrf.plots.curves import confusion_matrix as confusion_matrix
from jaxcrf.plots.curves import per_class_bars as per_class_bars
from jaxcrf.plots.curves import precision_recall as precision_recall
from jaxcrf.plots.curves import training_curves as training_curves
from jaxcrf.plots.curves import trimap_curve as trimap_curve
from jaxcrf.plots.pictures import DIFFERENCE_COLORS as DIFFERENCE_COLORS
from jaxcrf.plots.pictures import SHOWN_IN_FULL as SHOWN_IN_FULL
from jaxcrf.plots.pictures import affinity as affinity
from jaxcrf.plots.pictures import difference as difference
from jaxcrf.plots.pictures import feature_maps as feature_maps
from jaxcrf.plots.pictures import label_contexts as label_contexts
from jaxcrf.plots.pictures import overlay as overlay
from jaxcrf.plots.pictures import refinement_figure as refinement_figure
from jaxcrf.plots.pictures import save_figure as save_figure
from jaxcrf.plots.pictures import segmentation_grid as segmentation_grid
from jaxcrf.plots.pictures import uncertainty as uncertainty
