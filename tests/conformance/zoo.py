"""Hooks and averagers that are wrong on purpose, and the checks that each must fail: no others.

Their classes are in the modules wrong_*.py, whose text is one plugin's.
"""

from pathlib import Path

_PARTS = ("numbers", "memory", "modes", "averagers")
SOURCE = "\n\n".join((Path(__file__).parent / f"wrong_{part}.py").read_text(encoding="utf-8") for part in _PARTS)

BYTES = "2 * (p-1)/p * numel * itemsize"
EXACT = {"exact": True, "sent_bytes": BYTES}
ROUGH = {"sent_bytes": BYTES}
HALF = {"tolerance": 2e-3, "sent_bytes": "2 * (p-1)/p * numel * 2"}
UNEXPLAINED = EXACT | {"options": [{"name": "speed", "type": int, "default": 1}]}
WITH_PLACES = {"exact": True, "sent_bytes": "(p-1) * numel * (itemsize + 4)"}

# Name: (class, spec's fields, the checks that fail)
HOOKS = {
    "right": ("Right", EXACT, ()),
    "feeds_back": ("FeedsBack", ROUGH, ()),
    "takes_more": ("TakesMore", EXACT, ("factory_takes_the_options",)),
    "says_nothing": ("TakesMore", UNEXPLAINED, ("options_are_documented",)),
    "declares_no_bytes": ("Right", {"exact": True}, ("bytes_are_declared",)),
    "leaves_the_result": ("LeavesTheResult", EXACT, ("takes_results",)),
    "uses_the_payload_again": ("UsesThePayloadAgain", EXACT, ("takes_results",)),
    "wrong_dtype": ("WrongDtype", EXACT, ("runs",)),
    "wrong_shape": ("WrongShape", EXACT, ("runs",)),
    "communicates_itself": ("CommunicatesItself", EXACT, ("runs",)),
    "dies_in_native_code": ("DiesInNativeCode", EXACT, ("runs",)),
    "blocks": ("Blocks", EXACT, ("runs",)),
    "asks_by_value": ("AsksByValue", EXACT, ("asks_alike",)),
    "one_bit_per_rank": ("OneBitPerRank", EXACT, ("any_number_of_ranks",)),
    "differs_by_rank": ("DiffersByRank", EXACT, ("ranks_agree",)),
    "forgets_to_divide": ("ForgetsToDivide", EXACT, ("mean",)),
    "notes_the_largest": ("NotesTheLargest", EXACT, ("every_kind",)),
    "forgets_strides": ("ForgetsStrides", EXACT, ("every_kind_has_its_mean",)),
    "scatters_sums": ("ScattersSums", EXACT, ("scatters_means",)),
    "nan_for_zero": ("NanForZero", EXACT, ("zeros_stay_zero",)),
    "hides_an_inf": ("HidesAnInf", EXACT, ("non_finite_reaches_all",)),
    "floor_under_the_scale": ("FloorUnderTheScale", ROUGH, ("tiny_gradients",)),
    "casts_before_dividing": ("CastsBeforeDividing", HALF, ("huge_gradients",)),
    "draws_globally": ("DrawsFromTheGlobalGenerator", EXACT, ("random_generators",)),
    "places_as_floats": ("PlacesAsFloats", WITH_PLACES, ("wire",)),
    "fails_under_a_wire": ("FailsUnderAWire", EXACT, ("wire",)),
    "residual_of_the_average": ("ResidualOfTheAverage", ROUGH, ("residuals_stay_bounded",)),
    "loses_half": ("LosesHalf", ROUGH, ("feedback_sums_up",)),
    "stores_an_inf": ("StoresAnInf", ROUGH, ("non_finite_is_forgotten",)),
    "lies_about_its_bytes": ("Gathers", EXACT, ("bytes_as_declared",)),
    "grows": ("Grows", {"exact": True, "sent_bytes": "0"}, ("bytes_as_declared",)),
    "table_of_pairs": ("TableOfPairs", EXACT, ("bytes_stay_bounded",)),
    "shares_scratch": ("SharesScratch", EXACT, ("many_buckets",)),
    "by_bucket_index": ("ByBucketIndex", ROUGH, ("rebuilt_buckets",)),
    "turns_round": ("TurnsRound", ROUGH, ("trains",)),
    "leaks": ("Leaks", EXACT, ("memory_is_flat",)),
    "stays_busy": ("StaysBusy", EXACT, ("a_failing_peer",)),
    "leaves_residuals_behind": ("LeavesResidualsBehind", ROUGH, ("swapped",)),
    "fails_where_unused": ("IgnoresUnused", EXACT, ("unused_parameters",)),
    "counts_backwards": ("CountsBackwards", EXACT, ("accumulation",)),
    "divides_by_the_world": ("DividesByTheWorld", EXACT, ("uneven_inputs",)),
    "needs_the_world": ("NeedsTheWorld", EXACT, ("subgroups",)),
    "scaled_residuals": ("ScaledResiduals", ROUGH, ("loss_scaler",)),
    "norm_by_bucket": ("NormByBucket", EXACT, ("state_is_by_parameter",)),
    "outside_state": ("OutsideState", ROUGH, ("resumes",)),
}
AVERAGERS = {
    "averages": ("Averages", ROUGH, ()),
    "counts_questions": ("CountsQuestions", ROUGH, ("has_a_timetable",)),
    "skips_the_first": ("SkipsTheFirst", ROUGH, ("sends_when_due",)),
    "takes_turns": ("TakesTurns", ROUGH, ("group_agrees",)),
    "adds_up": ("AddsUp", ROUGH, ("equal_parameters_stay",)),
    "replaces_memory": ("ReplacesMemory", ROUGH, ("averages_in_place",)),
}
ZOO = HOOKS | AVERAGERS
