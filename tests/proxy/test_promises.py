"""Every promise of the guide's section about the proxy, and the tests that hold it.

A row is named by the guide's own words. To find what holds a promise, look here for its sentence.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests import test_control, test_serving_guide
from tests.guides import ROOT
from tests.proxy import (
    test_fields,
    test_llama_server,
    test_load,
    test_open,
    test_probing,
    test_proxy,
    test_serve,
    test_trouble,
    test_units,
)
from tests.session import test_stream

Tests = tuple[Callable[..., Any], ...]

PROMISES: dict[str, Tests] = {
    "If anything fails, the client gets the answer that it would have got": (
        test_trouble.test_if_the_second_leg_fails_the_first_one_goes_on,
        test_trouble.test_a_policy_that_fails_lets_the_lm_think_on,
        test_trouble.test_an_answer_in_an_odd_form_is_an_answer,
        test_load.test_many_streams_lose_and_mix_up_nothing,
        test_fields.test_what_is_malformed_is_the_server_s_to_answer,
    ),
    "Clients talk to it as they would to the server": (
        test_serving_guide.test_the_proxy_runs_as_it_stands,
        test_proxy.test_the_official_client_streams_a_halted_chat,
        test_proxy.test_the_official_client_takes_a_whole_completion,
    ),
    "everything else under `/v1` is passed on": (
        test_proxy.test_other_paths_are_relayed_as_they_are,
        test_trouble.test_a_path_cannot_lead_out_of_the_api,
    ),
    "asks the server for the 20 likeliest tokens": (
        test_units.test_what_is_asked_for_beside_is_what_the_client_did_not_ask_for,
    ),
    "takes out what the client did not ask for": (
        test_proxy.test_a_watched_thought_that_is_not_halted_is_what_the_server_says,
        test_proxy.test_log_probabilities_are_those_of_what_is_shown,
    ),
    "by its reasoning control, inside the running slot": (
        test_proxy.test_every_kind_of_server_is_halted,
        test_llama_server.test_chats_are_halted_by_reasoning_control,
        test_proxy.test_a_client_s_own_message_at_the_end_of_a_thought_is_kept,
    ),
    "by a second request with prompt, thought and close text": (
        test_proxy.test_the_second_leg_has_exactly_the_prompt_the_thought_and_the_close_text,
        test_llama_server.test_a_completion_is_halted_by_going_on_from_a_closed_thought,
    ),
    "by a second request that begins the assistant's message": (
        test_trouble.test_a_server_of_one_stream_is_halted,
    ),
    "`/v1/completions` with text; chats are passed on": (
        test_proxy.test_a_server_that_nobody_knows_is_halted_in_completions_alone,
    ),
    "without a cap the chat is passed on": (
        test_proxy.test_tools_before_a_server_that_shows_no_numbers_with_them,
    ),
    "a whole answer has that beginning, a stream does not": (
        test_proxy.test_what_a_client_has_begun_stays_in_a_whole_answer,
    ),
    "name the terms that do not hold there": (test_proxy.test_what_is_not_watched_is_told,),
    "the same, but the cap holds": (
        test_proxy.test_a_server_that_can_caps_what_is_not_watched,
        test_llama_server.test_a_cap_holds_to_the_token_in_a_response,
    ),
    "the answer is left alone": (
        test_proxy.test_an_answer_behind_a_closed_thought_is_no_thought,
        test_proxy.test_a_marker_in_what_a_user_says_means_nothing,
        test_proxy.test_a_completion_that_mentions_a_marker_is_no_thought,
    ),
    "as if the LM had come to its answer by itself": (
        test_open.test_an_answer_is_its_thought_the_close_text_and_what_the_lm_says_then,
        test_open.test_the_official_client_takes_a_halted_answer,
    ),
    "it is left alone (`thought apart`)": (
        test_open.test_a_thought_that_a_server_tells_apart_is_left_alone,
    ),
    "the marker is left out; the second thought is closed once before it begins": (
        test_proxy.test_a_close_that_the_lm_does_not_heed_is_followed_through,
        test_proxy.test_a_close_that_the_server_writes_itself_is_followed_through,
        test_proxy.test_a_second_thought_that_cannot_be_closed_is_the_lm_s,
    ),
    "256 tokens later a second request does": (
        test_proxy.test_a_close_that_the_server_writes_itself_is_followed_through,
    ),
    "halting waits for its end, 256 tokens at most": (
        test_proxy.test_a_cap_waits_for_the_end_of_a_call_and_not_for_ever,
        test_proxy.test_a_call_that_is_written_amid_a_thought_is_not_closed,
    ),
    "read all the same; an answer that is no stream is not halted": (
        test_trouble.test_an_answer_in_an_odd_form_is_an_answer,
    ),
    "The first request stays open until the second has delivered text of its answer": (
        test_trouble.test_if_the_second_leg_is_silent_the_first_one_goes_on,
        test_trouble.test_a_second_leg_that_waits_for_the_first_to_end_is_too_late,
        test_units.test_a_second_leg_has_to_answer,
    ),
    "the request is asked anew, unhalted": (
        test_trouble.test_a_server_of_one_stream_is_asked_again_if_the_second_leg_fails,
        test_trouble.test_a_server_of_one_stream_that_answers_otherwise_when_asked_again_is_heard,
    ),
    "What cannot be halted rightly is passed on unhalted": (
        test_proxy.test_what_cannot_be_halted_is_relayed_and_counted,
        test_proxy.test_prompts_of_ids_and_pictures_are_relayed,
    ),
    "asked again as the client asked it": (
        test_trouble.test_a_server_that_gives_few_log_probabilities_is_asked_again_without,
        test_trouble.test_a_stream_that_fails_before_it_says_anything_is_asked_for_again_without,
    ),
    "Servers' errors keep their status and body": (
        test_trouble.test_errors_of_the_server_are_passed_on,
    ),
    "ends in an `error` event and without `[DONE]`": (
        test_trouble.test_a_broken_stream_ends_in_a_clean_error,
        test_trouble.test_a_stream_that_is_only_passed_on_ends_in_a_clean_error,
    ),
    "come from the first of these that names them": (
        test_proxy.test_the_price_is_the_header_s_or_the_key_s_or_the_default,
    ),
    "other keys get a 401": (
        test_proxy.test_an_unknown_key_is_refused_everywhere_and_no_key_is_told,
    ),
    "Keys are kept as digests and never logged": (
        test_units.test_a_key_has_its_terms_and_is_kept_as_a_digest,
        test_proxy.test_an_unknown_key_is_refused_everywhere_and_no_key_is_told,
    ),
    "goes on to the server unless `--upstream-key-env` names another": (
        test_proxy.test_headers_of_the_proxy_are_not_passed_on_and_others_are,
        test_proxy.test_the_price_is_the_header_s_or_the_key_s_or_the_default,
    ),
    "the thought goes on meanwhile. What it writes until the answer is there is counted": (
        test_stream.test_an_answer_that_comes_late_halts_a_thought_where_it_is,
        test_llama_server.test_a_head_that_looks_at_answers_halts_where_its_replay_does,
    ),
    "greedily and as it was recorded": (
        test_probing.test_a_probe_goes_on_from_the_thought_at_its_point,
    ),
    "One answer at most is on its way for a stream, and `--max-probes` for all": (
        test_probing.test_a_point_is_passed_while_a_probe_is_on_its_way,
        test_probing.test_there_is_room_for_so_many_probes_and_not_in_the_place_of_streams,
    ),
    "on llama-server none takes the place of a stream": (
        test_probing.test_no_probe_takes_the_place_of_a_stream,
    ),
    "an answer that fails or is later than `--probe-timeout`, halt nothing": (
        test_probing.test_probes_that_fail_halt_nothing,
        test_probing.test_probes_that_are_late_halt_nothing,
    ),
    "A cap closes at once all the same": (
        test_probing.test_a_cap_closes_at_once_whatever_a_probe_does,
        test_stream.test_an_answer_that_is_too_late_halts_nothing,
    ),
    "the answer that the head has seen is the answer, behind the close text and at once": (
        test_probing.test_a_thought_is_halted_by_what_was_seen_of_its_answers,
        test_probing.test_the_official_client_takes_a_seen_answer,
    ),
    "is the LM's, as with `free`": (
        test_probing.test_an_answer_that_is_more_than_was_seen_is_the_lm_s,
        test_probing.test_a_limit_of_the_client_holds_for_a_seen_answer,
    ),
    "have no forced answers on any server: only a cap halts them": (
        test_probing.test_what_cannot_go_on_behind_a_thought_is_not_probed,
    ),
    "it refuses to start with these figures, unless `--probe-anyway`": (
        test_probing.test_a_server_of_one_stream_is_refused_with_the_figures,
        test_probing.test_a_trial_says_what_a_head_has_to_expect,
    ),
    "A server that does not answer at the start is not tried": (
        test_probing.test_a_server_that_is_not_there_yet_is_not_refused,
    ),
    "they are a part of the usage's own numbers, prompts included": (
        test_probing.test_usage_counts_every_probe,
    ),
    "**Usage** counts both requests": (test_proxy.test_usage_is_that_of_both_legs,),
    "Details that servers tell are added up too": (
        test_proxy.test_details_of_the_usage_of_both_legs_are_kept,
    ),
    "as `length` how far a thought went past its halt": (
        test_proxy.test_a_thought_that_goes_on_behind_its_halt_has_two_lengths,
    ),
    "ends at the client's own `stop` has the reason `token budget`": (
        test_proxy.test_a_client_s_own_end_is_not_the_lm_s,
    ),
    "(`--shadow`) halts nothing": (
        test_proxy.test_in_shadow_nothing_changes_and_the_saving_is_told,
    ),
    "gets a 415, unless it has a key or is JSON": (
        test_trouble.test_no_page_asks_by_the_way_of_a_browser_that_does_not_ask_first,
    ),
    "by the names of loopback and `--allowed-hosts` alone (421)": (
        test_trouble.test_pages_may_ask_by_the_names_that_are_allowed,
    ),
    "What they ask first needs no key": (
        test_proxy.test_a_browser_asks_without_a_key_what_it_may_ask_for,
    ),
    "There are `/health` and `/metrics`": (
        test_proxy.test_health_tells_how_the_server_is,
        test_proxy.test_metrics_count_what_has_happened,
    ),
    "JSON lines alone on stderr": (
        test_units.test_every_line_of_the_log_is_a_json_object,
        test_serve.test_clients_that_leave_do_not_fill_the_log,
        test_proxy.test_logs_have_a_line_a_request_and_never_what_was_said,
    ),
    "`--max-streams` (503 beyond it)": (test_trouble.test_there_are_no_more_streams_than_allowed,),
    "those that ask for nothing are closed; all such are after a minute": (
        test_trouble.test_clients_that_ask_for_nothing_make_room_for_others,
        test_trouble.test_a_client_that_asks_for_half_of_something_is_let_go,
    ),
    "`--max-body-bytes`": (test_trouble.test_a_request_has_a_largest_size,),
    "time limits to connect, read, send and drain": (
        test_trouble.test_a_silent_server_is_given_up,
        test_trouble.test_a_client_that_does_not_read_is_dropped_and_nobody_else,
        test_serve.test_a_request_that_never_ends_does_not_hold_it_up,
    ),
    "may take five seconds; then the LM thinks on": (
        test_trouble.test_what_a_server_does_not_tell_in_time_is_not_waited_for,
    ),
    "All wait for the same answer": (
        test_units.test_a_question_is_asked_once_for_all_who_wait_and_its_answer_kept,
        test_units.test_a_server_that_is_silent_is_waited_for_once,
    ),
    "whose name is not the head's is warned of at the first request": (
        test_serve.test_a_head_of_another_lm_is_told_once,
    ),
    "If a control raises, or gives a price that is none, the head does not halt that request": (
        test_control.test_a_control_that_fails_halts_nothing,
    ),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_of_the_guide_has_its_tests(promise: str) -> None:
    guide = " ".join((ROOT / "docs/SERVING.md").read_text().split())
    assert promise in guide
    assert PROMISES[promise] and all(
        test.__name__.startswith("test_") for test in PROMISES[promise]
    )
