from ds_lightning.tracking.curves import Curve, Curves


def test_a_long_curve_is_thinned_evenly():
    curve = Curve()
    for step in range(100_000):
        curve.add(step, float(step))
    assert 500 <= len(curve.steps) <= 1000
    gaps = {b - a for a, b in zip(curve.steps, curve.steps[1:], strict=False)}
    assert gaps == {128}
    assert curve.steps == [int(value) for value in curve.values]


def test_a_short_curve_is_kept_whole():
    curves = Curves()
    curves.add_rows([("loss", 0.5, 0, 1), ("loss", 0.25, 0, 2)])
    assert (curves["loss"].steps, curves["loss"].values) == ([1, 2], [0.5, 0.25])
    assert curves.picture().startswith(b"\x89PNG")
    assert curves.picture() is None, "nothing came since"


def test_the_number_of_curves_is_bounded():
    curves = Curves()
    curves.add_rows([(f"m{i}", 0.0, 0, 0) for i in range(1000)])
    assert len(curves) == 200
