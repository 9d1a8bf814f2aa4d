"""The arrays of the compact form: a file each, in a folder a split. N examples, G groups, C candidates."""

import numpy as np

VERSION = 3
ARRAYS = {
    "context_tokens": np.int32,  # contexts of all groups
    "group_context_end": np.int64,  # [G] end of each group's context in context_tokens
    "group_candidates": np.int32,  # [G] number of candidates
    "example_group_end": np.int64,  # [N]
    "example_candidate_end": np.int64,  # [N]
    "example_rows": np.int32,  # [N] rows of the flat layout: contexts and candidates
    "candidate_slot": np.int32,  # [C] place of a candidate in its example; they are stored group by group
    "candidate_blank": np.int32,  # [C] position of the [MASK] that the candidate fills
    "candidate_token_end": np.int64,  # [C] end of its rows in the two arrays below
    "candidate_inputs": np.int32,  # start-of-piece, then the candidate's tokens
    "candidate_targets": np.int32,  # the candidate's tokens, then end-of-piece
    "answers": np.int32,  # right candidates of all examples
    "example_answer_end": np.int64,  # [N]
}
