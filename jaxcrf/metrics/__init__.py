"""How good a labelling is: counts, the scores made of them, and bands around boundaries.

Everything here is pure and runs under `jax.jit` and `jax.vmap`. A data set is scored by its counts, added up batch by
batch, exactly and beyond int32:

    counts = ConfusionCounts.zeros(num_labels)
    for labels, predictions in batches:
        counts = counts.update(labels, predictions)
    mean_iou(counts)

The counts are pytrees: `+` merges those of two parts, `jax.lax.psum` those of devices. What is streamed equals what is
counted at once.
"""

from jaxcrf.metrics.boundaries import TrimapCounts as TrimapCounts
from jaxcrf.metrics.boundaries import TrimapCurve as TrimapCurve
from jaxcrf.metrics.boundaries import trimap_band as trimap_band
from jaxcrf.metrics.boundaries import trimap_curve as trimap_curve
from jaxcrf.metrics.confusion import ConfusionCounts as ConfusionCounts
from jaxcrf.metrics.confusion import LabelRow as LabelRow
from jaxcrf.metrics.confusion import class_accuracy as class_accuracy
from jaxcrf.metrics.confusion import confusion_matrix as confusion_matrix
from jaxcrf.metrics.confusion import mean_iou as mean_iou
from jaxcrf.metrics.confusion import per_class_iou as per_class_iou
from jaxcrf.metrics.confusion import per_class_table as per_class_table
from jaxcrf.metrics.confusion import pixel_accuracy as pixel_accuracy
from jaxcrf.metrics.objects import ObjectCounts as ObjectCounts
from jaxcrf.metrics.objects import ObjectScores as ObjectScores
from jaxcrf.metrics.objects import boundary_accuracy as boundary_accuracy
from jaxcrf.metrics.objects import localization_accuracy as localization_accuracy
from jaxcrf.metrics.objects import tagging_accuracy as tagging_accuracy
from jaxcrf.metrics.saliency import PrecisionRecallCurve as PrecisionRecallCurve
from jaxcrf.metrics.saliency import ThresholdCounts as ThresholdCounts
from jaxcrf.metrics.saliency import max_f_measure as max_f_measure
from jaxcrf.metrics.saliency import precision_recall_curve as precision_recall_curve
from jaxcrf.metrics.totals import Total as Total
