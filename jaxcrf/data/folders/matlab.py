"""MATLAB files, in which some data sets keep their annotations and lists."""

from pathlib import Path
from typing import Any


def read_matlab(path: Path, variable: str) -> Any:
    """Reads one variable of a `.mat` file.

    Args:
        path: the file, of MATLAB's version 4 to 7.2.
        variable: its name in the file.

    Returns:
        An array; structures are arrays of records and cell arrays are arrays of objects, as in SciPy.

    Raises:
        ValueError: if the file is missing or damaged, or does not hold the variable.

    Example:
        >>> import tempfile
        >>> import scipy.io
        >>> path = Path(tempfile.mkdtemp()) / "labels.mat"
        >>> scipy.io.savemat(path, {"labels": [[0, 1]]})
        >>> read_matlab(path, "labels").tolist()
        [[0, 1]]
    """
    # SciPy is always there, because JAX needs it, but loading this part of it takes time.
    from scipy.io import loadmat

    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    try:
        contents = loadmat(path, variable_names=[variable])
    # SciPy's reader raises whatever it stumbles over in a damaged file.
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read as a MATLAB file ({error}); it may be truncated or damaged, so replace it"
        ) from error
    if variable not in contents:
        raise ValueError(f"{path}: holds no variable {variable!r}; it is another kind of MATLAB file")
    return contents[variable]
