"""What is known of a value that depends on X, and of a call on such values.

A value that depends on X is one that requires grad, so autograd keeps the books through views, in-place writes and
foreign code. Beside it each carries a ``Tag``. x² opens a norm, a handwritten GELU and a squared ReLU, so nothing is
decided before it must be: the tag's kind is

    linear    affine in X: it has a place on the tape
    pending   φ(z), elementwise in one linear z; becomes φ(0) + z⊙r once a linear map wants it
    stat      a statistic such as mean(x²), to be settled by what it turns into
    scale     a statistic that was rooted or inverted: where it multiplies or divides, a norm
    scores    any other product of two values that depend on X, such as q·kᵀ: only a softmax may swallow it
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .tape import Ref, leaves, map_leaves


class UnsupportedOperation(RuntimeError):
    """A value that depends on X met an operation that no rule makes linear."""


@dataclass(slots=True)
class Tag:
    """What the recorder knows of one tensor that depends on X."""

    kind: str
    ref: Ref | None = None  # its place on the tape, if it has an affine form
    gate: bool = False  # it has passed a nonlinearity since its last matrix product
    base: Tensor | None = None  # it is the elementwise function ``fn`` of this linear tensor (None: of itself)
    fn: Callable | None = None
    settle: Callable | None = None  # makes the affine form of a pending value or a statistic, should one be wanted
    settled: tuple | None = None  # the affine form that was made, and its version then
    origin: str = ""  # where it stopped being affine, for the error
    summed: "Tag | None" = None  # what this is the sum of: exp(S) / sum(exp(S)) is a softmax
    vouched: bool = False  # a registered rule vouches for the foreign code that made it
    version: int = 0
    recorder: object = None  # whose: a model may carry a value from one run into the next


def dependent(x) -> bool:
    """Whether x is a tensor that depends on X: it carries a tag."""
    return isinstance(x, Tensor) and hasattr(x, "_tag")


def to_ref(x):
    return x._tag.ref if dependent(x) else x


def base_of(t: Tensor) -> Tensor:
    """What t is an elementwise function of: itself, too, once it was written to through a view."""
    return t if t._tag.base is None or t._tag.version != t._version else t._tag.base


def common_base(deps: list[Tensor]) -> Tensor | None:
    """The one linear tensor of which all of ``deps`` are elementwise functions, if there is one."""
    bases = [base_of(t) if t._tag.kind in ("linear", "pending") else None for t in deps]
    return bases[0] if all(b is bases[0] for b in bases) else None


@dataclass(slots=True)
class Call:
    """One intercepted call; ``deps`` are its tensors that depend on X."""

    func: Callable
    name: str
    args: tuple
    kwargs: dict
    deps: list[Tensor]

    def _with(self, f: Callable) -> tuple[tuple, dict]:
        return map_leaves(lambda x: f(x) if dependent(x) else x, (self.args, self.kwargs))

    def run(self, f=lambda t: t):
        """The call itself, with ``f`` on each tensor that depends on X."""
        args, kwargs = self._with(f)
        return self.func(*args, **kwargs)

    def mapped(self, f) -> "Call":
        """The call with ``f`` on each tensor that depends on X."""
        args, kwargs = self._with(f)
        return replace(self, args=args, kwargs=kwargs, deps=[t for t in leaves((args, kwargs)) if dependent(t)])

    def hold(self, old: Tensor, new: Tensor) -> "Call":
        return self.mapped(lambda t: new if t is old else t)

    def operands(self) -> tuple:
        """The two operands of a binary operation, however they are passed."""
        a, b = [*self.args, *self.kwargs.values()][:2]
        return a, b

    def bind(self, **defaults) -> dict:
        """The arguments by name, given the names in order with their defaults."""
        return {**defaults, **dict(zip(defaults, self.args, strict=False)), **self.kwargs}

    def composed(self) -> Callable:
        """An elementwise call on values that share a base, as the function of that base."""
        inner = {id(t): None if base_of(t) is t else t._tag.fn for t in self.deps}
        return self.unless_overwritten(lambda z: self.run(lambda t: inner[id(t)](z) if inner[id(t)] else z))

    def unless_overwritten(self, f: Callable) -> Callable:
        """``f``, which will read the call's constants later, guarded against their being written to meanwhile."""
        constants = [x for x in leaves((self.args, self.kwargs)) if isinstance(x, Tensor) and not dependent(x)]
        seen = [(x, x._version) for x in constants if not x.is_inference()]

        def checked(*z):
            if any(x._version != v for x, v in seen):
                raise UnsupportedOperation(f"{title(self.func)} read a constant that was overwritten before its result "
                                           "was used; give the model a copy to write to")  # fmt: skip
            return f(*z)

        return checked


def title(func) -> str:
    """An operation's name as errors and cuts give it, such as torch.Tensor.mul."""
    func = func.__self__ if func.__name__ == "__get__" else func
    owner = getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__name__", "torch")
    return f"{owner}.{func.__name__}".replace("torch._C._", "torch.").replace("TensorBase", "torch.Tensor")
