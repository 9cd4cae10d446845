"""Images, label maps and data sets as files."""

from jaxcrf.data.images import read_array as read_array
from jaxcrf.data.images import read_image as read_image
from jaxcrf.data.images import read_labels as read_labels
from jaxcrf.data.images import voc_palette as voc_palette
from jaxcrf.data.images import write_array as write_array
from jaxcrf.data.images import write_image as write_image
from jaxcrf.data.images import write_labels as write_labels
