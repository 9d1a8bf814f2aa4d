from torch_xmlir.nn import checkpoint  # noqa: F401
