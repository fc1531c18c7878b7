from sensmerge.tasks.methods.remarks import remark, remarks


def test_remarks_are_heard_in_the_innermost_block_and_once() -> None:
    remark("nobody hears this")
    with remarks() as outer:
        remark("a")
        with remarks() as inner:
            remark("b")
            remark("b")
        remark("c")
    assert (outer, inner) == (["a", "c"], ["b"])
