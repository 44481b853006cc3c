from flexolmo_hf.evaluation.data.sources.pieces import in_pieces


def test_neighbours_are_joined_up_to_the_longest_and_not_beyond():
    assert in_pieces(["aaa", "bbb", "ccc"], longest=7, joint="\n") == ["aaa\nbbb", "ccc"]
    assert in_pieces(["aaa", "bbb", "ccc"], longest=6, joint="\n") == ["aaa", "bbb", "ccc"]


def test_long_part_is_cut_between_its_lines_and_a_line_never():
    assert in_pieces(["aa\nbb\ncc", "dd"], longest=5, joint="\n\n") == ["aa\nbb", "cc", "dd"]
    assert in_pieces(["abcdefgh"], longest=3, joint=" ") == ["abcdefgh"]


def test_blank_parts_are_left_out():
    assert in_pieces(["", " \n", "a"], longest=9, joint="\n") == ["a"]
