"""What a function becomes when it is traced, for tests of the form of a program rather than of its result."""

import jax


def equations(function, *arguments, name):
    """Return all equations of a primitive in the traced function, those of inner functions and loops included."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == name:
                found.append(equation)
            for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(value, "eqns"):
                    walk(value)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found
