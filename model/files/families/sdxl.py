"""SDXL (Podell et al. 2023): recognised, to be refused by its name."""

from controlnet.model.files.families.family import Family

SDXL = Family("SDXL", 2048, added=True, supported=False)
REFINER = Family("SDXL's refiner", 1280, added=True, supported=False)
