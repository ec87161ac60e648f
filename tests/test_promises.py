"""Every promise of the guide about running beside an LM, and the tests that hold it.

A row is named by the guide's own words. To find what holds a promise, look here for its sentence.
Every sentence, item and row of the guide is a promise with a row, or one that promises nothing.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests import (
    test_control,
    test_control_guide,
    test_guides,
    test_packaging,
    test_serving_guide,
    test_whole_way,
)
from tests.benchmarks import test_votes as test_votes_benchmark
from tests.engine import test_burst
from tests.guides import all_blocks, page
from tests.policy import test_head, test_votes
from tests.proxy import (
    test_acceptance,
    test_fields,
    test_governed,
    test_llama_server,
    test_load,
    test_open,
    test_probing,
    test_proxy,
    test_serve,
    test_trouble,
    test_units,
)
from tests.proxy import test_votes as test_proxy_votes
from tests.session import (
    test_monitor,
    test_request,
    test_session,
    test_signal_collector,
    test_stream,
)
from tests.transformers import (
    test_batch_job,
    test_hub,
    test_processor,
)
from tests.transformers import test_probing as test_probing_generation
from tests.vllm import test_batch_job as test_vllm_job
from tests.vllm import test_processor as test_vllm
from tests.vllm_engine import test_batch_jobs as test_vllm_engine

Tests = tuple[Callable[..., Any], ...]

PROMISES: dict[str, Tests] = {
    # Of any adapter
    "Its snippets run as they stand": (
        test_serving_guide.test_a_snippet_runs_as_it_stands,
        test_serving_guide.test_the_proxy_runs_as_it_stands,
    ),
    "and refuses others": (
        test_probing_generation.test_heads_that_do_not_fit_are_refused,
        test_processor.test_heads_that_do_not_fit_are_refused,
        test_vllm.test_heads_that_vllm_cannot_serve_are_refused,
    ),
    "| `generate`, `HaltProcessor` |": (
        test_processor.test_a_halted_lm_answers_greedily_by_itself_while_others_think_on,
    ),
    "Behind a thought that was halted or capped only the likeliest token is left": (
        test_processor.test_a_halted_lm_answers_greedily_by_itself_while_others_think_on,
        test_processor.test_the_likeliest_token_is_that_of_the_scores_that_other_processors_have_left,
    ),
    "`HaltProcessor(..., free_answers=True)` has answers sampled as the call says": (
        test_processor.test_free_answers_are_sampled_as_the_call_has_it,
    ),
    "| `generate`, `ProbingGeneration` |": (
        test_probing_generation.test_a_halted_row_gets_its_forced_answer_and_others_go_on,
    ),
    "| `generate_all`, for batch jobs |": (
        test_batch_job.test_rows_are_halted_as_beside_generate,
        test_batch_job.test_answers_by_hand,
    ),
    "the answer is the one that most of three thoughts give": (
        test_batch_job.test_the_answer_of_most_thoughts_is_given,
        test_votes.test_most_answers_win_and_of_equals_the_earliest,
    ),
    "`thoughts` has all": (test_batch_job.test_the_answer_of_most_thoughts_is_given,),
    "Answers agree that are read alike": (
        test_batch_job.test_the_answer_of_most_thoughts_is_given,
    ),
    "none begins that could not change the answer any more": (
        test_batch_job.test_the_answer_of_most_thoughts_is_given,
        test_votes.test_what_is_settled_is_what_no_further_thought_could_change,
    ),
    "What it will cost you is told beforehand by recorded traces": (
        test_votes_benchmark.test_a_run_halts_thoughts_alone_at_its_prices,
        test_votes_benchmark.test_wrong_answers_that_agree_outvote_a_right_one,
    ),
    "| vLLM, `haltwise.vllm:HaltProcessor` |": (
        test_vllm.test_v1_requests_go_as_each_does_alone,
        test_vllm.test_heads_that_vllm_cannot_serve_are_refused,
        test_vllm.test_a_head_that_reads_hidden_states_is_refused,
    ),
    'also where the request is sampled, unless `"free_answers": true` stands beside `head`': (
        test_vllm.test_a_sampled_request_is_answered_with_likeliest_tokens_behind_a_closed_thought,
        test_vllm.test_v1_requests_go_as_each_does_alone,
        test_vllm.test_v2_requests_go_as_each_does_alone,
        test_vllm.test_likeliest_tokens_need_no_copy_to_the_host_and_greedy_requests_none_of_them,
    ),
    "Where a grammar or the like forbids the close text": (
        test_vllm.test_a_token_that_is_forbidden_is_not_forced_nor_is_what_follows,
        test_vllm.test_v2_leaves_a_request_that_it_takes_up_again_to_the_lm_and_its_cap,
    ),
    "| vLLM's engine, `haltwise.vllm.generate_all` |": (
        test_vllm_job.test_answers_are_those_of_transformers,
        test_vllm_job.test_an_lm_whose_head_does_not_look_answers_by_itself,
        test_vllm_job.test_what_cannot_be_run_is_refused,
    ),
    "without the groups `ending`, `hidden`": (
        test_serve.test_a_setting_out_of_its_range_is_refused,
        test_stream.test_a_head_that_needs_more_than_a_server_shows_is_refused,
        test_proxy.test_every_kind_of_server_is_halted,
        test_probing.test_a_thought_is_halted_by_what_was_seen_of_its_answers,
    ),
    "| your own loop, `HaltMonitor` |": (test_monitor.test_rows_halt_by_their_own_history,),
    "trains a head that runs everywhere": (test_guides.test_every_command_of_a_page_runs,),
    "at 0 the head never halts": (
        test_monitor.test_at_a_price_of_0_a_row_is_never_halted,
        test_stream.test_a_price_of_0_asks_for_no_answer,
    ),
    "`min_tokens`, before which the head does not halt": (
        test_probing_generation.test_before_min_tokens_no_head_halts,
        test_proxy.test_a_thought_has_a_least_and_a_largest_length,
    ),
    "a thought is closed whatever the head says": (
        test_session.test_a_cap_holds_between_points_and_where_the_head_may_not_halt,
    ),
    "it works at any token, also where the head sees nothing": (
        test_session.test_a_cap_holds_between_points_and_where_the_head_may_not_halt,
        test_stream.test_numbers_that_are_missing_never_halt_a_thought_but_its_cap_does,
    ),
    "begins behind its cap is closed where it begins": (
        test_processor.test_a_thought_that_opens_behind_its_cap_is_closed_where_it_opens,
    ),
    "the operator's cap is the highest, and no request lifts it": (
        test_request.test_no_client_lifts_the_operators_cap,
    ),
    "the head does not halt; the cap holds": (test_request.test_no_client_lifts_the_operators_cap,),
    "where no price is named, that of the segment holds": (
        test_request.test_who_names_a_segment_and_no_price_has_that_of_the_segment,
    ),
    "Requests to the proxy and to vLLM's `HaltProcessor` name all of them": (
        test_proxy.test_a_segment_without_a_price_is_told,
        test_vllm.test_bad_terms_are_the_request_s_error,
    ),
    "Whatever you call from Python": (
        test_processor.test_terms_that_make_no_sense_are_refused,
        test_probing_generation.test_terms_that_make_no_sense_are_refused_before_any_call,
        test_batch_job.test_what_cannot_be_run_is_refused,
    ),
    "`HaltMonitor` takes the price alone": (
        test_monitor.test_at_a_price_of_0_a_row_is_never_halted,
    ),
    "`off` is a price of 0, and the price of a segment": (
        test_monitor.test_at_a_price_of_0_a_row_is_never_halted,
        test_head.test_a_segment_has_its_own_price,
    ),
    "exactly the tokens that they would get without a head": (
        test_processor.test_a_head_that_never_halts_changes_nothing,
        test_probing_generation.test_a_head_that_never_halts_changes_nothing,
        test_batch_job.test_a_head_that_never_halts_changes_nothing,
        test_vllm.test_v1_requests_go_as_each_does_alone,
    ),
    "never halts anything and never breaks a generation": (
        test_monitor.test_a_signal_that_is_not_a_number_continues_and_is_counted,
        test_processor.test_logits_that_are_not_numbers_halt_nothing,
        test_vllm.test_logits_that_are_no_numbers_never_halt_and_are_counted,
        test_stream.test_numbers_that_are_missing_never_halt_a_thought_but_its_cap_does,
    ),
    # In transformers
    "is one logits processor of one `generate` call": (
        test_serving_guide.test_every_integration_takes_ten_lines_at_most,
        test_processor.test_a_processor_is_for_one_call_of_its_own_lm,
    ),
    "`HaltProcessor` never touches the cache": (test_processor.test_any_cache_will_do,),
    "left padding, streamers, and `num_return_sequences`": (
        test_processor.test_streamers_are_served,
        test_processor.test_several_answers_to_a_prompt_are_rows,
        test_processor.test_a_row_alone_is_halted_as_in_any_batch_and_as_by_a_probing_generation,
    ),
    "sees the LM's own logits through a hook": (test_processor.test_signals_are_the_lms_own,),
    "it copies nothing to the host": (
        test_processor.test_between_decision_points_nothing_is_copied_to_the_host,
    ),
    "tells for each row where and why the thought ended": (
        test_processor.test_positions_and_ends_by_hand,
    ),
    "with the same object are refused with one line": (
        test_processor.test_generation_that_cannot_be_halted_is_refused,
        test_processor.test_a_processor_is_for_one_call_of_its_own_lm,
    ),
    "runs as a `custom_generate`": (test_serving_guide.test_a_snippet_runs_as_it_stands,),
    "The answer that it has seen is the answer:": (
        test_probing_generation.test_a_halted_row_gets_its_forced_answer_and_others_go_on,
    ),
    "whatever kind of cache it is, forces their answers, and drops the copies": (
        test_probing_generation.test_any_cache_will_do,
    ),
    "It was tried with Llama, Mistral": (
        test_whole_way.test_a_random_lm_of_every_family_goes_the_whole_way,
    ),
    "gives a slot to the next prompt as soon as its answer is known": (
        test_batch_job.test_prompts_are_taken_as_slots_become_free,
    ),
    "the LM answers behind a closed thought with its likeliest tokens at any temperature": (
        test_batch_job.test_behind_closed_thoughts_answers_are_the_likeliest_tokens_and_free_ones_are_drawn,
        test_batch_job.test_a_thought_goes_on_where_its_answer_is_refused,
    ),
    "but for likeliest ones behind a closed thought as there": (
        test_vllm_job.test_behind_closed_thoughts_answers_are_the_likeliest_tokens_unless_they_are_free,
    ),
    "It needs full attention in every layer, and samples by temperature alone": (
        test_batch_job.test_what_cannot_be_run_is_refused,
        test_batch_job.test_sampled_answers_depend_on_the_prompt_and_the_seed_alone,
    ),
    "that runs in anybody's `generate`": (
        test_hub.test_a_folder_runs_its_head_inside_generate,
        test_hub.test_a_repository_of_the_hub_finds_its_own_head,
    ),
    "the head, `custom_generate/`, and a model card": (
        test_hub.test_the_command_exports,
        test_hub.test_the_card_tells_what_the_head_is_for,
    ),
    # In vLLM
    "One class serves both of vLLM's model runners": (
        test_vllm.test_it_is_a_processor_of_both_runners_and_never_skipped_for_greedy,
        test_vllm.test_v2_requests_go_as_each_does_alone,
    ),
    "`haltwise_price`, `haltwise_min_tokens`": (
        test_vllm.test_a_request_is_halted_on_its_own_terms,
        test_vllm.test_sound_terms_pass,
    ),
    "A bad value is an HTTP 400": (
        test_vllm.test_bad_terms_are_the_request_s_error,
        test_vllm.test_a_halted_request_has_one_line_in_the_log_without_content,
    ),
    "that ends amid the close text doubles its end": (
        test_vllm.test_tokens_that_v1_does_not_show_yet_do_not_double_the_close_text,
    ),
    "Speculative decoding is refused at the start": (
        test_vllm.test_an_engine_that_cannot_be_halted_is_refused_at_start,
    ),
    "but a batch job can, by requests of its own": (
        test_vllm_engine.test_the_guides_job_runs_as_it_stands,
    ),
    "of transformers, and the same code decides": (
        test_vllm_job.test_answers_are_those_of_transformers,
        test_vllm_engine.test_answers_halts_and_looks_are_those_of_transformers,
    ),
    "the engine has those of all prompts in one batch": (
        test_vllm_job.test_looks_of_some_run_beside_the_thoughts_of_others,
    ),
    "without it a line of the log warns": (
        test_vllm_job.test_an_engine_without_a_prefix_cache_is_told_of,
    ),
    "are those of `llm.generate`": (
        test_vllm_engine.test_where_nothing_halts_the_tokens_are_those_of_vllm_itself,
        test_vllm_engine.test_sampled_tokens_have_the_lms_distribution,
        test_vllm_job.test_sampled_tokens_hang_on_the_prompt_the_seed_and_the_place,
    ),
    "A look costs one token more if the head has the group `ending`": (
        test_vllm_job.test_how_likely_the_lm_ends_its_thought_takes_a_token_a_look,
    ),
    "A head that needs what vLLM does not show is refused": (
        test_vllm_job.test_what_cannot_be_run_is_refused,
        test_vllm_job.test_who_leaves_a_job_leaves_an_idle_engine,
    ),
    # The proxy
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
        test_proxy.test_a_cap_that_a_server_refuses_costs_no_answer,
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
    "passed on each by itself, unhalted (`several choices`)": (
        test_proxy.test_choices_that_nobody_asked_for_are_passed_on_each_by_itself,
        test_proxy.test_an_answer_of_several_choices_is_whole_if_each_is,
        test_units.test_a_stream_that_breaks_off_amid_one_of_its_choices_is_not_whole,
    ),
    "read all the same; an answer that is no stream is not halted": (
        test_trouble.test_an_answer_in_an_odd_form_is_an_answer,
    ),
    "the second then runs in another slot, which computes prompt and thought anew": (
        test_trouble.test_a_server_with_slots_of_its_own_is_left_before_unless_it_is_crowded_or_checked,
    ),
    "so there the first is left before": (
        test_llama_server.test_a_closed_thought_goes_on_in_the_slot_that_has_computed_it,
        test_trouble.test_a_server_with_slots_of_its_own_is_left_before_unless_it_is_crowded_or_checked,
    ),
    "The first request stays open until the second has delivered text of its answer": (
        test_trouble.test_if_the_second_leg_is_silent_the_first_one_goes_on,
        test_trouble.test_a_second_leg_that_waits_for_the_first_to_end_is_too_late,
        test_units.test_a_second_leg_has_to_answer,
    ),
    "the first goes on as if nothing had been tried": (
        test_trouble.test_if_the_second_leg_fails_the_first_one_goes_on,
        test_trouble.test_a_second_leg_that_waits_for_the_first_to_end_is_too_late,
        test_load.test_many_streams_lose_and_mix_up_nothing,
    ),
    "the request is asked anew, unhalted": (
        test_trouble.test_a_server_of_one_stream_is_asked_again_if_the_second_leg_fails,
        test_trouble.test_a_server_of_one_stream_that_answers_otherwise_when_asked_again_is_heard,
    ),
    "goes on to its end, unhalted, where its answer cannot be read": (
        test_batch_job.test_an_answer_that_is_not_read_is_refused_unless_the_cap_has_closed_its_thought,
    ),
    "a function of the answer's text, may ask for more than that": (
        test_batch_job.test_a_thought_goes_on_where_its_answer_is_refused,
        test_probing_generation.test_a_thought_goes_on_where_its_answer_is_refused,
    ),
    "What was refused counts as a look": (
        test_batch_job.test_a_thought_goes_on_where_its_answer_is_refused,
    ),
    "A cap closes a thought whatever its answer is": (
        test_probing_generation.test_a_thought_goes_on_where_its_answer_is_refused,
        test_batch_job.test_an_answer_that_is_not_read_is_refused_unless_the_cap_has_closed_its_thought,
    ),
    "halts nothing on one that cannot be read": (
        test_head.test_nothing_is_halted_without_an_answer,
    ),
    "is held back until it is whole": (test_acceptance.test_an_answer_that_is_accepted_is_given,),
    "goes on to its end as if nothing had been tried": (
        test_acceptance.test_where_no_answer_is_accepted_clients_get_what_they_would_have_got,
    ),
    "which gets the request's body and the answer's text": (
        test_acceptance.test_where_no_answer_is_accepted_clients_get_what_they_would_have_got,
        test_acceptance.test_an_answer_that_is_accepted_is_given,
    ),
    "A refused answer is paid for": (
        test_acceptance.test_where_no_answer_is_accepted_clients_get_what_they_would_have_got,
    ),
    "the full answer, at the tokens of both": (
        test_governed.test_an_audit_counts_the_full_answer_where_halting_would_have_been_taken_back,
    ),
    "A cap asks nobody": (test_acceptance.test_a_cap_closes_a_thought_whatever_its_answer_is,),
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
    "A file of keys that everybody can read is warned of": (
        test_governed.test_a_key_that_is_lost_or_readable_is_told,
    ),
    "whatever the head, is named in a warning": (
        test_serve.test_a_server_that_does_not_answer_at_start_is_told,
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
    "Turns are asked for by the native endpoint, `/completion`": (
        test_probing.test_log_probabilities_that_nobody_reads_are_not_asked_for,
        test_probing.test_where_a_gateway_lets_no_native_path_through_turns_are_completions,
    ),
    "A head without the group `distribution` reads none of the thought's own": (
        test_probing.test_log_probabilities_that_nobody_reads_are_not_asked_for,
    ),
    "Where a busy server then tells several tokens at once": (
        test_probing.test_log_probabilities_that_nobody_reads_are_not_asked_for,
    ),
    "Elsewhere tokens cannot be told apart without log probabilities": (
        test_probing.test_log_probabilities_that_nobody_reads_are_not_asked_for,
    ),
    "The thought is asked for in turns, each a request that ends at the next decision point": (
        test_probing.test_a_thought_in_turns_that_nobody_halts_is_that_of_one_stream,
    ),
    "There the slot is free, and its cache has all but the close text": (
        test_llama_server.test_a_slot_computes_only_what_is_new_to_it,
    ),
    "The server ends the answer itself, at the text that ends answers": (
        test_probing.test_a_server_with_slots_ends_answers_itself_and_a_text_amid_one_ends_none,
        test_llama_server.test_an_answer_that_the_server_ends_has_the_tokens_of_one_that_its_client_leaves,
    ),
    "The first time that this happens a warning says so": (
        test_probing.test_a_turn_that_was_computed_anew_is_told,
    ),
    "Start a llama-server of several slots with `--slot-prompt-similarity 0.8`": (
        test_llama_server.test_thoughts_in_turns_are_not_computed_anew_beside_each_other,
    ),
    "Behind the answer the next turn goes on from prompt and thought": (
        test_llama_server.test_a_slot_computes_only_what_is_new_to_it,
    ),
    "So one slot is enough": (
        test_llama_server.test_in_turn_a_thought_is_halted_exactly_where_its_replay_is,
        test_probing.test_a_server_of_one_stream_is_refused_with_the_figures,
    ),
    "the tokens of one stream, but for ties within rounding": (
        test_llama_server.test_a_thought_in_turns_has_the_tokens_of_one_stream,
    ),
    "a client's `seed` gives other draws than without a proxy": (
        test_probing.test_a_turn_takes_up_the_limits_of_its_request,
    ),
    "what the server has written on its way is written once more": (
        test_probing.test_a_turn_ends_at_a_point_that_hangs_on_a_text,
    ),
    "It is `late`, `timeout` or `no answer` where the second request": (
        test_trouble.test_a_second_leg_that_waits_for_the_first_to_end_is_too_late,
        test_trouble.test_if_the_second_leg_fails_the_first_one_goes_on,
        test_units.test_a_second_leg_has_to_answer,
    ),
    "`answer refused` where an answer was checked": (
        test_acceptance.test_where_no_answer_is_accepted_clients_get_what_they_would_have_got,
    ),
    "`large LM` where that did not answer": (
        test_llama_server.test_a_large_lm_answers_while_it_lives_and_then_the_small_one,
    ),
    "Give the server as many slots as there are streams at once": (
        test_probing.test_points_that_are_passed_for_want_of_slots_are_told,
    ),
    "The first time a warning says so, and `passed`": (
        test_probing.test_points_that_are_passed_for_want_of_slots_are_told,
    ),
    "While there are more streams than slots, points are passed": (
        test_probing.test_there_is_room_for_so_many_probes_and_not_in_the_place_of_streams,
    ),
    "A turn that fails before it begins is asked for once more": (
        test_probing.test_a_turn_that_fails_is_tried_once_more_and_nobody_looks_then,
    ),
    "If that fails too, the stream ends as one that breaks off": (
        test_probing.test_a_turn_that_fails_is_tried_once_more_and_nobody_looks_then,
        test_llama_server.test_a_server_that_dies_between_two_turns_is_a_clean_error,
    ),
    "the proxy gives it the form of a chat again": (
        test_probing.test_a_chat_has_its_thought_in_a_field_of_its_own,
        test_llama_server.test_a_thought_in_turns_has_the_tokens_of_one_stream,
    ),
    "*Beside* the running stream, on other servers": (
        test_probing.test_a_thought_is_halted_by_what_was_seen_of_its_answers,
    ),
    "for requests that hang on more than their newest token": (
        test_probing.test_what_hangs_on_all_of_an_answer_is_looked_at_beside,
    ),
    "Such are those with a `stop`": (
        test_probing.test_what_hangs_on_all_of_an_answer_is_looked_at_beside,
    ),
    "A thought in turns counts as one request, whose prompt counts once": (
        test_llama_server.test_a_thought_in_turns_has_the_tokens_of_one_stream,
    ),
    "are offered by `--most-thoughts 3`": (
        test_proxy_votes.test_where_two_agree_there_is_no_third,
        test_proxy_votes.test_the_earliest_thought_with_the_answer_of_most_is_given_whole,
        test_proxy_votes.test_who_does_not_ask_has_one_thought,
        test_proxy_votes.test_what_nobody_watches_or_offers_is_refused,
        test_llama_server.test_of_three_sampled_thoughts_no_third_begins_where_two_agree,
    ),
    "until none could change the vote any more": (
        test_proxy_votes.test_where_two_agree_there_is_no_third,
        test_votes.test_what_is_settled_is_what_no_further_thought_could_change,
    ),
    "Until then it gets a comment": (
        test_proxy_votes.test_a_silent_vote_says_that_it_is_alive,
        test_proxy_votes.test_who_waits_for_no_vote_hears_the_lm_alone,
    ),
    "An answer that the head's rule cannot read is no vote": (
        test_proxy_votes.test_the_earliest_thought_with_the_answer_of_most_is_given_whole,
    ),
    "and each further one has the next": (
        test_proxy_votes.test_where_two_agree_there_is_no_third,
        test_proxy_votes.test_without_a_seed_none_is_named_and_at_a_price_of_0_nothing_is_halted,
    ),
    "and its events come once the vote is settled": (
        test_proxy_votes.test_the_earliest_thought_with_the_answer_of_most_is_given_whole,
        test_proxy_votes.test_a_stream_begins_at_once_and_says_nothing_before_the_vote,
    ),
    "Usage counts all thoughts": (test_proxy_votes.test_usage_counts_all_thoughts,),
    "how it ended and how many have its answer": (
        test_proxy_votes.test_where_two_agree_there_is_no_third,
        test_proxy_votes.test_the_earliest_thought_with_the_answer_of_most_is_given_whole,
    ),
    "those before it decide, and `failed` says why": (
        test_proxy_votes.test_if_a_later_thought_fails_those_before_it_decide,
        test_proxy_votes.test_the_first_thought_fails_as_if_it_were_alone,
    ),
    "Budgets hold back for all thoughts": (
        test_proxy_votes.test_as_much_is_held_back_for_each_thought,
        test_proxy_votes.test_a_budget_holds_back_for_all_and_pays_for_those_that_ran,
    ),
    "several choices gets a 400 that says so": (
        test_proxy_votes.test_what_cannot_be_voted_on_is_refused,
        test_proxy_votes.test_what_nobody_watches_or_offers_is_refused,
    ),
    "The flag is refused beside `--large`": (
        test_proxy_votes.test_what_knows_of_one_thought_is_refused_beside_several,
    ),
    "`turns` tells how many it took": (
        test_probing.test_a_thought_in_turns_that_nobody_halts_is_that_of_one_stream,
    ),
    "The prefix cache has the thought, and the thought goes on meanwhile": (
        test_llama_server.test_a_head_that_looks_at_answers_halts_where_its_replay_does,
    ),
    "What it writes until the answer is there is counted": (
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
    "On llama-server none takes the place of a stream": (
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
    "with `seen`, an answer behind a thought that was cut is therefore the likeliest one too": (
        test_proxy.test_behind_a_halted_thought_the_likeliest_answer_follows_as_it_was_recorded,
        test_llama_server.test_behind_a_halted_thought_that_is_sampled_the_likeliest_answer_follows,
    ),
    "A thought that nobody halted is answered as the request samples": (
        test_proxy.test_behind_a_halted_thought_the_likeliest_answer_follows_as_it_was_recorded,
    ),
    "With `free` all answers are sampled as the request says": (
        test_proxy.test_behind_a_halted_thought_the_likeliest_answer_follows_as_it_was_recorded,
    ),
    "answers are sampled all the same": (
        test_proxy.test_what_a_second_request_cannot_do_or_need_not_llama_server_ends_itself,
    ),
    "or fewer tokens than it has, is the LM's own": (
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
    "What counts is the server's own pace, on the machine as it is": (
        test_probing.test_a_trial_says_what_a_head_has_to_expect,
        test_probing.test_a_sound_server_on_a_slow_machine_is_not_refused,
    ),
    "An answer later than `--probe-timeout` is only warned of": (
        test_probing.test_what_may_come_of_a_busy_machine_is_told_and_no_reason_to_refuse,
        test_probing.test_a_sound_server_on_a_slow_machine_is_not_refused,
    ),
    "It is tried once it serves clients": (
        test_probing.test_a_server_that_is_not_there_yet_is_not_refused,
        test_probing.test_a_server_that_comes_later_is_tried_then,
    ),
    "is asked for no answer by that key before": (
        test_probing.test_no_probe_is_asked_for_before_a_server_wants_it,
        test_probing.test_a_client_that_is_refused_is_told_when_to_come_back_and_has_no_probes_until_then,
        test_units.test_a_server_says_in_seconds_or_by_a_date_when_to_come_back,
    ),
    "which are a part of the usage's own numbers, prompts included": (
        test_probing.test_usage_counts_every_probe,
    ),
    "**Usage** counts both requests": (test_proxy.test_usage_is_that_of_both_legs,),
    "tells whether and where the thought was halted, and the tokens of each": (
        test_proxy.test_usage_is_that_of_both_legs,
        test_proxy.test_a_thought_is_halted_at_the_point_that_was_computed_by_hand,
    ),
    "`fallback` says why a thought that was to be halted went on": (
        test_trouble.test_if_the_second_leg_fails_the_first_one_goes_on,
    ),
    "The log has all of these too": (
        test_proxy.test_logs_have_a_line_a_request_and_never_what_was_said,
    ),
    "Details that servers tell are added up too": (
        test_proxy.test_details_of_the_usage_of_both_legs_are_kept,
    ),
    "`length` tells how far the thought went on": (
        test_proxy.test_a_thought_that_goes_on_behind_its_halt_has_two_lengths,
    ),
    "`length` is how many tokens a thought had at last": (
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
    "Standard error has JSON lines alone": (
        test_units.test_every_line_of_the_log_is_a_json_object,
        test_serve.test_clients_that_leave_do_not_fill_the_log,
        test_proxy.test_logs_have_a_line_a_request_and_never_what_was_said,
    ),
    "Beyond `--max-streams` a request gets a 503": (
        test_trouble.test_there_are_no_more_streams_than_allowed,
    ),
    "those that ask for nothing are closed, and all such are after a minute": (
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
    "has a name like the head's is warned of at the first request": (
        test_serve.test_a_head_of_another_lm_is_told_once,
    ),
    "If a control raises, or gives a price that is none, the head does not halt that request": (
        test_control.test_a_control_that_fails_halts_nothing,
    ),
    # The proxy, where no row above names the sentence
    "Any OpenAI-compatible server can be behind the proxy": (
        test_proxy.test_every_kind_of_server_is_halted,
        test_proxy.test_a_server_that_nobody_knows_is_halted_in_completions_alone,
    ),
    "The proxy reads the streamed log probabilities and ends the thought": (
        test_proxy.test_a_thought_is_halted_at_the_point_that_was_computed_by_hand,
    ),
    "listens on 127.0.0.1:8700 unless": (
        test_serve.test_it_listens_on_the_loopback_interface_alone,
    ),
    "Where its port is taken, it says so and does not start": (
        test_serve.test_processes_that_share_a_port_share_its_requests,
    ),
    "tell whether its thought was halted": (
        test_proxy.test_logs_have_a_line_a_request_and_never_what_was_said,
        test_proxy.test_a_thought_is_halted_at_the_point_that_was_computed_by_hand,
    ),
    "| Ollama, the client began the answer |": (
        test_proxy.test_what_a_client_has_begun_stays_in_a_whole_answer,
    ),
    "runs before every server that goes on from prompts": (
        test_probing.test_a_thought_is_halted_by_what_was_seen_of_its_answers,
    ),
    "What follows a halted or capped thought, `--answers` says": (
        test_probing.test_a_thought_is_halted_by_what_was_seen_of_its_answers,
    ),
    "It has to be whole": (test_probing.test_an_answer_that_is_more_than_was_seen_is_the_lm_s,),
    "logs what that took": (test_probing.test_a_trial_tells_of_a_probe_what_the_server_tells,),
    "how many thinking tokens that would have saved": (
        test_proxy.test_in_shadow_nothing_changes_and_the_saving_is_told,
    ),
    "`--price`, `--min-thinking-tokens` and `--max-thinking-tokens`; the head's own price": (
        test_proxy.test_the_price_is_the_header_s_or_the_key_s_or_the_default,
        test_proxy.test_a_thought_has_a_least_and_a_largest_length,
    ),
    "is not asked for again for ten seconds": (
        test_units.test_a_server_that_is_silent_is_waited_for_once,
        test_units.test_a_template_that_is_silent_is_waited_for_once,
    ),
    "Certificates come from the system or from `SSL_CERT_FILE`": (
        test_units.test_certificates_come_from_where_the_system_says,
    ),
    "At a SIGHUP the head and the keys are read anew, and no stream is dropped": (
        test_serve.test_the_head_and_the_keys_are_read_anew_and_no_stream_is_dropped,
    ),
    "What cannot be used then (a broken file, a head for": (
        test_serve.test_the_head_and_the_keys_are_read_anew_and_no_stream_is_dropped,
        test_serve.test_another_head_is_not_read_under_a_control,
    ),
    "if a head was recorded from a server of another kind": (
        test_serve.test_a_head_that_was_recorded_from_another_server_is_told,
    ),
    "the proxy warns of the first request above a temperature of 0 that is sampled by `top_k`": (
        test_proxy.test_samplers_that_the_traces_were_recorded_without_are_told,
    ),
    "has no cap, and `ignored` in the header `X-Haltwise` names the terms that do not hold": (
        test_proxy.test_a_cap_that_cannot_hold_is_named,
    ),
    "An `Off` that is false names nothing": (
        test_request.test_what_a_request_leaves_out_is_as_in_the_default,
    ),
    "first request of another temperature": (
        test_proxy.test_a_temperature_that_is_not_that_of_the_traces_is_told,
    ),
    # Controls
    "Every adapter takes a `control`": (
        test_control.test_a_logits_processor_obeys,
        test_control.test_a_probing_generation_obeys,
        test_control.test_a_repository_of_the_hub_obeys,
        test_control.test_a_batch_job_obeys,
        test_control.test_vllm_obeys,
        test_control.test_a_stream_obeys,
    ),
    "is told what happened to the request": (test_control.test_the_guides_control_runs,),
    "Without one, a request's own terms stay as they are": (
        test_processor.test_rows_are_halted_on_their_own_terms_and_in_their_own_time,
    ),
    "likewise with `ProbingGeneration`, `generate_all` and `hub.generate`": (
        test_control.test_a_logits_processor_obeys,
        test_control.test_a_batch_job_obeys,
    ),
    '"control": "MODULE:NAME"': (
        test_control.test_vllm_obeys,
        test_control.test_what_is_no_control_is_refused,
    ),
    "The control that haltwise has, `--control observe` and `apply`": (
        test_control_guide.test_the_guide_certifies_a_price_and_halts_at_it,
    ),
    "With tensor parallelism in vLLM a control may not move prices": (
        test_vllm.test_a_control_that_moves_prices_is_refused_where_each_process_asks_its_own,
    ),
    "has a price of 0 in its terms": (test_request.test_no_client_lifts_the_operators_cap,),
    "in the same six words everywhere": (
        test_session.test_one_vocabulary_says_why_a_thought_ended,
    ),
    "`halted`, `capped`, `closed by the LM`": (
        test_session.test_one_vocabulary_says_why_a_thought_ended,
    ),
    "when its `report` is read, or when it is gone": (
        test_control.test_a_control_is_told_of_a_call_whose_report_nobody_reads,
    ),
    "In V1 that is told at once": (
        test_vllm.test_a_control_is_told_how_a_request_ended_after_its_latest_look,
    ),
    "Whatever else ended a request is told then too": (
        test_vllm.test_a_control_is_told_how_a_request_ended_after_its_latest_look,
    ),
    "has the reason in `fallback`, and its position": (
        test_trouble.test_if_the_second_leg_fails_the_first_one_goes_on,
    ),
    # A loop of one's own
    "The head itself needs numpy and safetensors only": (
        test_packaging.test_base_dependencies_are_two,
    ),
    "signals go in, and which rows the head would halt comes out": (
        test_monitor.test_rows_halt_by_their_own_history,
    ),
    "A row joins with `reset(rows)`": (
        test_monitor.test_a_row_that_was_reset_starts_anew_at_its_price,
    ),
    "`haltwise.Session` does all that an adapter needs": (
        test_session.test_a_head_is_asked_at_points_and_a_report_tells_what_came_of_it,
    ),
    "makes signals from log probabilities and texts": (
        test_signal_collector.test_signals_are_of_the_tokens_since_the_previous_point,
    ),
    "and whether to close the thought comes out": (
        test_stream.test_a_thought_is_halted_once_and_only_inside_of_itself,
    ),
    "do not wait for a token's copy there either": (
        test_burst.test_no_step_of_a_burst_waits_for_the_device,
    ),
}

#: Of sentences that promise nothing, or nothing that a test could hold: how the page goes on, what
#: a reader may do, what was decided and why, and what was measured once, in docs/LOG.md.
TELLS = (
    "Log probabilities cost the server time at every token",
    "This page says how a head runs",
    "What a head looks at is called its `probing`",
    "That decides where it can run:",
    "It looks at no answer, so it costs no tokens",
    "Every request may have its own *terms*:",
    "A fixed batch runs until its longest row",
    "It says what they gain on one thought",
    "They cost 46.3 % less",
    "These LMs are then right on 1.8 points",
    "To upload it, give `export` the name",
    "`pip install vllm -e .`",
    "A server takes the same on its command line:",
    "A request names its terms in `vllm_xargs`:",
    "`make test-vllm` runs all of this",
    "To try it, write the embedded LM",
    "`llama-server` is a program of",
    "If you have no `llama-server`",
    "In a terminal of its own, this serves the file",
    "If your head halts nothing, ask for a higher price",
    "The embedded LM writes thousands of tokens a second",
    "A slower LM goes on for fewer",
    "**`/v1/responses` is not watched**",
    "Its events of a thought",
    "asks for those of the answer alone",
    "To ask the chat endpoint instead would lose",
    "`previous_response_id`, `conversation` and `store`",
    "repeat all that was said",
    "A client that wants its thoughts halted asks",
    "An operator whose cap has to hold everywhere",
    "**No answer is lost.",
    "**Answers can be checked first.**",
    "processor cannot go back",
    "It costs a stream the time of",
    "Take `free` if clients expect explanations",
    "Forced answers are recorded as the LM's likeliest tokens",
    "give llama-server at least one slot more",
    "*In turn*, on llama-server",
    "Looking pays in time where",
    "| a look behind the proxy before llama-server",
    "| the same on the embedded LM, 1 / 8 / 32 streams",
    "It runs until you press Ctrl+C",
    "Begin with it.",
    "**Browsers.",
    "**Operation.",
    "One process watches several thousand tokens a second",
    "**Tried for real** were",
    "are supported from their documentation",
    "With llama-server's defaults (flash attention",
    "For those that the head was trained on",
    "In Python, pass the object:",
    "vLLM and the proxy take its name and make the object themselves:",
    "It is up to the control to respect that",
    "Some adapters learn of the end late:",
    "vLLM does not tell a processor why a request ends",
    "`make bench` measures it",
    "These are medians on two shared cores",
    "has the spreads and the conditions",
    "| `generate` with a head that never halts, 135M",
    "| the same for the embedded LM",
    "| vLLM 0.32 on a CPU",
    "| time saved / tokens saved",
    "| the same in 32 refilled slots",
    "| the same in fixed batches",
    "| proxy, one stream",
    "| proxy, CPU time of a watched token",
    "No GPU was at hand",
    "On a GPU a token costs one copy",
)


def told(text: str) -> list[str]:
    """The sentences, items and rows of a page, without its headings, blocks and heads of tables."""
    for block in all_blocks(text):
        text = text.replace(block.text, "\n")
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", re.sub(r"(?m)^(```.*|#.*)$", "", text)):
        if paragraph.lstrip().startswith("|"):
            found += paragraph.strip().split("\n")[2:]
            continue
        for item in re.split(r"(?m)^- ", paragraph):
            found += re.split(r"(?<=[.:;?]) (?=[A-Z*`\[(])", " ".join(item.split()))
    return [sentence for sentence in found if sentence]


SENTENCES = told(page("SERVING"))


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_of_the_guide_has_its_tests(promise: str) -> None:
    assert any(promise in sentence for sentence in SENTENCES)
    assert PROMISES[promise] and all(
        test.__name__.startswith("test_") for test in PROMISES[promise]
    )


@pytest.mark.parametrize("words", TELLS)
def test_what_promises_nothing_stands_in_the_guide(words: str) -> None:
    assert any(words in sentence for sentence in SENTENCES)


def unnamed(sentences: list[str]) -> list[str]:
    """Those of some sentences that are neither a promise with a row nor known to be none."""
    known = (*PROMISES, *TELLS)
    return [sentence for sentence in sentences if not any(words in sentence for words in known)]


def test_no_sentence_of_the_guide_is_without_a_row() -> None:
    assert unnamed(SENTENCES) == []


def test_a_new_promise_without_a_row_is_found() -> None:
    table = "| a | b |\n|---|---|\n| c | d |\n"
    new = f"# H\n\nNothing is ever slow. It never\nfails.\n\n- Nor late.\n\n{table}"
    assert unnamed(told(new)) == [
        "Nothing is ever slow.",
        "It never fails.",
        "Nor late.",
        "| c | d |",
    ]
