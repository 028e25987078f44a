"""The point nearest to all models at once."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_some, promoted, weighted_mean
from sd_mecha.builtin.methods.gram import check_weiszfeld, gram_matrix, median_weights, pairs
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.reductions import Dot


@merge_method(tiling="elementwise")
def geometric_median(
    *models: Parameter(Tensor),
    eps: Parameter(float) = 1e-6,
    maxiter: Parameter(int) = 100,
    ftol: Parameter(float) = 1e-20,
) -> Return(Tensor):
    """Take the point with the least sum of distances to all models, tensor by tensor: an average without outliers.

    Formula: Weiszfeld's iteration from the mean: `y = (sum m_i / d_i) / (sum 1 / d_i)`, `d_i = max(|m_i - y|, eps)`.
    It runs on the inner products of the models' differences, so the tensors are read twice however many steps it
    takes.

    Args:
        models: one or more models, all weights or all deltas.
        eps: above 0; the least distance a step divides by.
        maxiter: at least 0; the number of steps at most. 0 gives the mean.
        ftol: at least 0; stop when the sum of distances changes by a smaller share.

    Use when: some of many models may be broken or far off: less than half of them cannot move the result far.
    Cost: two passes (the inner products of all pairs, then elementwise).
    Source: Weiszfeld 1937; robust aggregation, arXiv 1912.13445.

    >>> import sd_mecha
    >>> models = [sd_mecha.model({"w": torch.tensor([v, v])}) for v in (1.0, 1.0, 90.0)]
    >>> sd_mecha.merge(sd_mecha.geometric_median(*models), output_dtype=None)["w"].round(decimals=3)
    tensor([1., 1.])
    """
    check_weiszfeld("geometric_median", eps, maxiter, ftol)
    check_some("geometric_median", models)
    models = promoted(*models)
    count = len(models)
    if count == 1:
        return models[0].clone()
    # differences, since models that share a base are alike in all but the last digits of their inner products
    wide = torch.promote_types(models[0].dtype, torch.float32)
    offsets = [torch.sub(model.to(wide), models[0]) for model in models[1:]]
    products = yield tuple(Dot(offsets[i], offsets[j]) for i, j in pairs(count - 1))
    del offsets
    gram = gram_matrix(products, count - 1)
    weights = (1 / count,) * count
    if gram is not None:
        around_first = ((0.0,) * count, *((0.0, *row) for row in gram))
        weights = median_weights(around_first, eps, maxiter, ftol)
    return weighted_mean(models, weights)
