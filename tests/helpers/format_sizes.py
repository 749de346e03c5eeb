"""Storage formats to compare, and the bytes of a model."""

from lowrank.linalg import Scheme
from lowrank.plans.storage_formats import FLOAT, INT8, StorageFormat

INT4 = Scheme("int4", 32)
SOME = [FLOAT, StorageFormat(INT8), StorageFormat(INT4), StorageFormat(INT4, correction=True)]


def size(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
