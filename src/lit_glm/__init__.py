"""lit_glm fine-tunes GLM on ReCoRD on a given chip and records how fast and how well."""

__version__ = "0.2.0"
