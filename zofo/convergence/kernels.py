"""The hybrid step compiled: many seeds and many rates of one problem in one loop.

Losses and gradients equal those of the problems' torch code up to rounding. `Problem.compiled`
supplies the numbers that define a problem. Directions come from zofo's noise kernels at the
addresses that `zofo.HybridOptimizer` uses. All rates of a seed share them.
"""

# Numba reads these functions' types from their arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import math

import numba
import numpy as np

from zofo.convergence.problems.base import GROWING, LOGISTIC, QUADRATIC
from zofo.noise import kernel_draws as noise
from zofo.noise.kernel_cache import can_cache

_CACHE = can_cache()
_LINEAR, _EXPONENTIAL = 0, 1


@numba.njit(cache=_CACHE)
def _law_value(law, z):
    kind, l0, a, p = law
    if kind == _LINEAR:
        t = a * abs(z)  # expm1 keeps the digits that e^t − 1 loses near 0
        return l0 / (a * a) * (math.expm1(t) - t)
    if kind == _EXPONENTIAL:
        half = math.sinh(a * z / 2)
        return 2 * l0 / (a * a) * half * half
    return 0.5 * l0 * z * z + a / p * abs(z) ** p


@numba.njit(cache=_CACHE)
def _law_slope(law, z):
    kind, l0, a, p = law
    sign = 1.0 if z > 0 else (-1.0 if z < 0 else 0.0)
    if kind == _LINEAR:
        return l0 / a * sign * math.expm1(a * abs(z))
    if kind == _EXPONENTIAL:
        return l0 / a * math.sinh(a * z)
    return l0 * z + a * sign * abs(z) ** (p - 1)


@numba.njit(cache=_CACHE)
def _residual(params, row, w, d_x, projected, activation):
    """Forward pass of the network. It fills Vᵀ z and the activations."""
    hidden, inputs, rank = int(params[0]), int(params[1]), int(params[2])
    # w is laid out as W [hidden, inputs], U [hidden, rank], V [inputs, rank], row by row. The
    # output weights follow five other numbers in params, and the target ends the row.
    v = d_x + hidden * rank
    for r in range(rank):
        projected[r] = 0.0
        for m in range(inputs):
            projected[r] += w[v + m * rank + r] * row[m]
    out = 0.0
    for k in range(hidden):
        before = 0.0
        for m in range(inputs):
            before += w[k * inputs + m] * row[m]
        for r in range(rank):
            before += w[d_x + k * rank + r] * projected[r]
        activation[k] = math.tanh(before)
        out += params[5 + k] * activation[k]
    return out - row[inputs]


@numba.njit(cache=_CACHE)
def loss_of(kind, d_x, params, row, w, scratch):
    """f_i(w)."""
    d, total = w.size, 0.0
    if kind == QUADRATIC:
        scale, linear = row[0], 0.0
        for j in range(d):
            total += params[1 + j] * w[j] * w[j]
            linear += row[1 + j] * w[j]
        total = 0.5 * total
        if params[0] != 0:
            cross = 0.0
            for j in range(min(d_x, d - d_x)):
                cross += w[j] * w[d_x + j]
            total += params[0] * cross
        return scale * total + linear
    if kind == GROWING:
        law_x = (params[0], params[1], params[2], params[3])
        law_y = (params[4], params[5], params[6], params[7])
        for j in range(d):
            total += _law_value(law_x if j < d_x else law_y, w[j]) + row[j] * w[j]
        return total
    if kind == LOGISTIC:
        margin = 0.0
        for j in range(d):
            margin += row[j] * w[j]
            square = w[j] * w[j]
            total += square if params[1] != 0 else square / (1 + square)
        # Both forms equal log(1 + e^−margin); this choice never takes the exponential of a large
        # number.
        loss = (
            math.log1p(math.exp(-margin)) if margin > 0 else math.log1p(math.exp(margin)) - margin
        )
        return loss + 0.5 * params[0] * total
    half = scratch.size // 2
    residual = _residual(params, row, w, d_x, scratch[:half], scratch[half:])
    x2, y2 = _squares(w, d_x)
    return 0.5 * residual * residual + 0.5 * params[3] * x2 + 0.25 * params[4] * y2 * y2


@numba.njit(cache=_CACHE)
def _squares(w, d_x):
    """‖x‖² and ‖y‖² of w = (x, y)."""
    x2, y2 = 0.0, 0.0
    for j in range(d_x):
        x2 += w[j] * w[j]
    for j in range(d_x, w.size):
        y2 += w[j] * w[j]
    return x2, y2


@numba.njit(cache=_CACHE)
def gradient_of(kind, d_x, params, row, w, scratch, begin, out):
    """Write ∇f_i(w) into out, from coordinate `begin` on, which is 0 or d_x."""
    d = w.size
    if kind == QUADRATIC:
        for j in range(begin, d):
            out[j] = row[0] * (params[1 + j] * w[j]) + row[1 + j]
        if params[0] != 0:
            for j in range(min(d_x, d - d_x)):
                if begin == 0:
                    out[j] += row[0] * params[0] * w[d_x + j]
                out[d_x + j] += row[0] * params[0] * w[j]
    elif kind == GROWING:
        law_x = (params[0], params[1], params[2], params[3])
        law_y = (params[4], params[5], params[6], params[7])
        for j in range(begin, d):
            out[j] = _law_slope(law_x if j < d_x else law_y, w[j]) + row[j]
    elif kind == LOGISTIC:
        margin = 0.0
        for j in range(d):
            margin += row[j] * w[j]
        factor = -1 / (1 + math.exp(margin))
        for j in range(begin, d):
            bent = 1 + w[j] * w[j]
            pull = w[j] if params[1] != 0 else w[j] / (bent * bent)
            out[j] = params[0] * pull + factor * row[j]
    else:
        _network_gradient(d_x, params, row, w, scratch, begin, out)


@numba.njit(cache=_CACHE)
def _network_gradient(d_x, params, row, w, scratch, begin, out):
    hidden, inputs, rank = int(params[0]), int(params[1]), int(params[2])
    half, v = scratch.size // 2, d_x + hidden * rank
    projected, activation = scratch[:half], scratch[half:]
    residual = _residual(params, row, w, d_x, projected, activation)
    y2 = _squares(w, d_x)[1]
    # The penalty sets the adapter's part first, because every hidden unit below adds to it.
    for j in range(d_x, w.size):
        out[j] = params[4] * y2 * w[j]
    for k in range(hidden):
        delta = residual * params[5 + k] * (1 - activation[k] * activation[k])
        if begin == 0:
            for m in range(inputs):
                out[k * inputs + m] = delta * row[m] + params[3] * w[k * inputs + m]
        for r in range(rank):
            out[d_x + k * rank + r] += delta * projected[r]
            back = w[d_x + k * rank + r] * delta
            for m in range(inputs):
                out[v + m * rank + r] += row[m] * back


@numba.njit(cache=_CACHE)
def whole_gradient(kind, d_x, params, data, mean_row, w, scratch, part, out):
    """Write ∇f(w) into out."""
    begin = np.int64(0)
    if mean_row.size > 0:  # this row's loss is f itself, so one evaluation replaces n
        gradient_of(kind, d_x, params, mean_row, w, scratch, begin, out)
        return
    out[:] = 0
    for i in range(len(data)):
        gradient_of(kind, d_x, params, data[i], w, scratch, begin, part)
        for j in range(w.size):
            out[j] += part[j] / len(data)


@numba.njit(cache=_CACHE)
def measure(kind, d_x, params, data, mean_row, points, limit, lost, squares):
    """Write ‖∇_x f‖² and ‖∇_y f‖² of every run that is not lost; mark new lost runs."""
    d = points.shape[2]
    out, part, scratch = np.empty(d), np.empty(d), np.empty(2 * d + 2)
    for q in range(points.shape[0]):
        for s in range(points.shape[1]):
            if lost[q, s]:
                continue
            whole_gradient(kind, d_x, params, data, mean_row, points[q, s], scratch, part, out)
            x2, y2 = _squares(out, d_x)
            squares[0, q, s], squares[1, q, s] = x2, y2
            if not x2 + y2 < limit:  # `not <` is true for NaN as well
                lost[q, s] = True


@numba.njit(cache=_CACHE)
def draw(out, words, values, seed, step, num_directions, is_gaussian):
    """Directions of one step: out [directions, d_x]; the other arrays are buffers of the noise."""
    zero, one = np.uint64(0), np.float64(1)
    out[:] = 0
    for k in range(num_directions):
        index = np.uint64(k)
        if is_gaussian:
            noise.add_gaussian(out[k], words, values, 0, out.shape[1], one, seed, step, index, zero)
        else:
            noise.add_rademacher(out[k], words, 0, out.shape[1], one, seed, step, index, zero)


@numba.njit(cache=_CACHE)
def move(problem, runs, how):
    """One epoch, in place: points [rates, seeds, d], order [seeds, n]."""
    kind, d_x, params, data = problem
    points, lost, lr_x, lr_y, seeds, order, first_step = runs
    is_zeroth, _, is_gaussian, num_directions, _ = how
    num_rates, num_seeds, d = points.shape
    begin = d_x if is_zeroth else 0  # the base needs no gradient if it moves by differences
    gradient, away, scratch = np.empty(d), np.empty(d), np.empty(2 * d + 2)
    directions, delta = np.empty((num_directions, d_x)), np.empty(d_x)
    words, values = np.empty(d_x + 256, np.uint32), np.empty(d_x + 256, np.float32)
    for s in range(num_seeds):
        for i in range(order.shape[1]):
            row = data[order[s, i]]
            if is_zeroth:  # one draw serves all rates
                step = np.uint64(first_step + i)
                draw(directions, words, values, seeds[s], step, num_directions, is_gaussian)
            for q in range(num_rates):
                if lost[q, s]:
                    continue
                w = points[q, s]
                gradient_of(kind, d_x, params, row, w, scratch, begin, gradient)
                if is_zeroth:
                    _along(problem, row, w, scratch, directions, how, away, lr_x[q], delta)
                    # `gradient` was taken before this write, so both blocks move from one point.
                    for j in range(d_x):
                        w[j] = w[j] + delta[j]
                else:
                    for j in range(d_x):
                        w[j] = w[j] - lr_x[q] * gradient[j]
                for j in range(d_x, d):
                    w[j] = w[j] - lr_y[q] * gradient[j]


@numba.njit(cache=_CACHE)
def move_quadratic(problem, runs, how):
    """`move` for quadratics with a zeroth-order base: the same numbers, inlined, 4 × faster."""
    _, d_x, params, data = problem
    points, lost, lr_x, lr_y, seeds, order, first_step = runs
    _, is_central, is_gaussian, num_directions, eps = how
    num_rates, num_seeds, d = points.shape
    shared, coupling = min(d_x, d - d_x), params[0]
    directions, delta = np.empty((num_directions, d_x)), np.empty(d_x)
    words, values = np.empty(d_x + 256, np.uint32), np.empty(d_x + 256, np.float32)
    w, away, gradient = np.empty(d), np.empty(d), np.empty(d)
    for s in range(num_seeds):
        for i in range(order.shape[1]):
            sample = order[s, i]
            scale = data[sample, 0]
            step = np.uint64(first_step + i)
            draw(directions, words, values, seeds[s], step, num_directions, is_gaussian)
            for q in range(num_rates):
                if lost[q, s]:
                    continue
                for j in range(d):
                    w[j] = points[q, s, j]
                    away[j] = w[j]
                for j in range(d_x, d):
                    gradient[j] = scale * (params[1 + j] * w[j]) + data[sample, 1 + j]
                if coupling != 0:
                    for j in range(shared):
                        gradient[d_x + j] += scale * coupling * w[j]
                loss = 0.0
                if not is_central:
                    loss = _quadratic(params, data, sample, w, coupling, shared, d_x)
                for j in range(d_x):
                    delta[j] = 0.0
                for k in range(num_directions):
                    for j in range(d_x):
                        away[j] = w[j] + eps * directions[k, j]
                    ahead = _quadratic(params, data, sample, away, coupling, shared, d_x)
                    if is_central:
                        for j in range(d_x):
                            away[j] = w[j] - eps * directions[k, j]
                        behind = _quadratic(params, data, sample, away, coupling, shared, d_x)
                        scalar = (ahead - behind) / (2 * eps)
                    else:
                        scalar = (ahead - loss) / eps
                    coefficient = -lr_x[q] * scalar / num_directions
                    for j in range(d_x):
                        delta[j] += coefficient * directions[k, j]
                for j in range(d_x):
                    points[q, s, j] = w[j] + delta[j]
                for j in range(d_x, d):
                    points[q, s, j] = w[j] - lr_y[q] * gradient[j]


@numba.njit(cache=_CACHE, inline="always")
def _quadratic(params, data, sample, w, coupling, shared, d_x):
    total, linear = 0.0, 0.0
    for j in range(w.size):
        total += params[1 + j] * w[j] * w[j]
        linear += data[sample, 1 + j] * w[j]
    total = 0.5 * total
    if coupling != 0:
        cross = 0.0
        for j in range(shared):
            cross += w[j] * w[d_x + j]
        total += coupling * cross
    return data[sample, 0] * total + linear


@numba.njit(cache=_CACHE)
def _along(problem, row, w, scratch, directions, how, away, lr, delta):
    """Write the base's step −(lr / K) Σ_k s_k v_k into delta."""
    kind, d_x, params, _ = problem
    _, is_central, _, _, eps = how
    loss = 0.0 if is_central else loss_of(kind, d_x, params, row, w, scratch)
    away[:] = w  # only its base part changes below; the adapter's part stays that of w
    delta[:] = 0
    num_directions = directions.shape[0]
    for k in range(num_directions):
        v = directions[k]
        for j in range(d_x):
            away[j] = w[j] + eps * v[j]
        ahead = loss_of(kind, d_x, params, row, away, scratch)
        if is_central:
            for j in range(d_x):
                away[j] = w[j] - eps * v[j]
            behind = loss_of(kind, d_x, params, row, away, scratch)
            scalar = (ahead - behind) / (2 * eps)
        else:
            scalar = (ahead - loss) / eps
        coefficient = -lr * scalar / num_directions
        for j in range(d_x):
            delta[j] += coefficient * v[j]


@numba.njit(cache=_CACHE)
def draw_many(num, d_x, seed, is_gaussian):
    """The first direction of `num` steps: [num, d_x]."""
    out = np.empty((num, 1, d_x))
    words, values = np.empty(d_x + 256, np.uint32), np.empty(d_x + 256, np.float32)
    for t in range(num):
        draw(out[t], words, values, seed, np.uint64(t), 1, is_gaussian)
    return out[:, 0]
