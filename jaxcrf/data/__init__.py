"""Images, label maps and data sets as files."""

from jaxcrf.data.folders import SegmentationFolder as SegmentationFolder
from jaxcrf.data.folders import camvid_folder as camvid_folder
from jaxcrf.data.folders import open_folder as open_folder
from jaxcrf.data.folders import voc_folder as voc_folder
from jaxcrf.data.images import read_array as read_array
from jaxcrf.data.images import read_image as read_image
from jaxcrf.data.images import read_labels as read_labels
from jaxcrf.data.images import voc_palette as voc_palette
from jaxcrf.data.images import write_array as write_array
from jaxcrf.data.images import write_image as write_image
from jaxcrf.data.images import write_labels as write_labels
from jaxcrf.data.synthetic import corrupt_labels as corrupt_labels
from jaxcrf.data.synthetic import corrupt_probs as corrupt_probs
