"""Other tools' interfaces, on jaxcrf's arithmetic: the only place where their conventions live."""

from jaxcrf.compat import convcrf as convcrf
from jaxcrf.compat import pydensecrf as pydensecrf
