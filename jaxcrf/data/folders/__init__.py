"""Data sets as folders on disk: lists of image and label files, read one at a time.

`open_folder` tells these layouts apart, and `datasets` lists them; every one has a function of its own:

```
name                 function                    layout
voc2012              voc_folder                  JPEGImages/<name>.jpg  SegmentationClass/<name>.png
                                                 ImageSets/Segmentation/<split>.txt, and for the augmented splits
                                                 benchmark_RELEASE/dataset/ (SBD) or SegmentationClassAug/
person_part          person_part_folder          JPEGImages/<name>.jpg  pascal_person_part_gt/<name>.png
                                                 pascal_person_part_trainval_list/<split>_id.txt
stanford_background  stanford_background_folder  images/<name>.jpg  labels/<name>.regions.txt
pascal_s             pascal_s_folder             datasets/imgs/pascal/<name>.jpg  datasets/masks/pascal/<name>.png
hku_is               hku_is_folder               imgs/<name>.png  gt/<name>.png  <split>ImgSet.mat
coco_voc             coco_folder                 annotations/instances_<split>.json  <split>/<name>.jpg
msra10k              msra10k_folder              Imgs/<name>.jpg  Imgs/<name>.png
camvid               camvid_folder               <split>/images/<name>.jpg|png  <split>/labels/<name>.png
image_mask           image_mask_folder           images/<name>.jpg|png  masks/<name>.png, with or without splits
                                                 labels.txt
```

Nothing is downloaded: a missing file is an error that says where the data set can be had.
"""

from jaxcrf.data.folders.base import Dataset as Dataset
from jaxcrf.data.folders.base import SegmentationFolder as SegmentationFolder
from jaxcrf.data.folders.coco import coco_folder as coco_folder
from jaxcrf.data.folders.generic import image_mask_folder as image_mask_folder
from jaxcrf.data.folders.pascal import person_part_folder as person_part_folder
from jaxcrf.data.folders.pascal import voc_folder as voc_folder
from jaxcrf.data.folders.registry import datasets as datasets
from jaxcrf.data.folders.registry import open_folder as open_folder
from jaxcrf.data.folders.saliency import hku_is_folder as hku_is_folder
from jaxcrf.data.folders.saliency import msra10k_folder as msra10k_folder
from jaxcrf.data.folders.saliency import pascal_s_folder as pascal_s_folder
from jaxcrf.data.folders.scenes import camvid_folder as camvid_folder
from jaxcrf.data.folders.scenes import stanford_background_folder as stanford_background_folder
