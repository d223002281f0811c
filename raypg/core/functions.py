"""Functions of ``pg_catalog`` that a read may call: harmless to repeat, and without a trace in the session.

Why a list and not the catalogue's volatility: ``STABLE`` functions exist that execute any SQL they are given
(``table_to_xml`` …) or that assign a transaction id (``txid_current``), and ``VOLATILE`` ones that are
harmless (``random``). The list was chosen by hand from the functions that PostgreSQL 15 and 18 both have; a
test holds it against the catalogue of a live server.

Names are compared as the parser gives them: folded to lower case unless quoted.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "CLOCK",
    "FORBIDDEN",
    "LOCAL",
    "LOCAL_RELATIONS",
    "NEWER",
    "NEWER_VOLATILE",
    "PURE",
    "READ",
    "STEADY",
    "VOLATILE_BUT_HARMLESS",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The catalogue, looked at
_CATALOGUE: Final = _names("""
    aclexplode col_description format_type has_any_column_privilege has_column_privilege has_database_privilege
    has_foreign_data_wrapper_privilege has_function_privilege has_language_privilege has_schema_privilege
    has_sequence_privilege has_server_privilege has_table_privilege has_tablespace_privilege
    has_type_privilege obj_description pg_char_to_encoding pg_client_encoding pg_collation_for
    pg_collation_is_visible pg_column_compression pg_column_is_updatable pg_column_size pg_describe_object
    pg_encoding_to_char pg_function_is_visible pg_get_constraintdef pg_get_expr
    pg_get_function_arg_default pg_get_function_arguments pg_get_function_identity_arguments
    pg_get_function_result pg_get_functiondef pg_get_indexdef pg_get_keywords pg_get_object_address
    pg_get_partition_constraintdef pg_get_partkeydef pg_get_ruledef pg_get_serial_sequence
    pg_get_statisticsobjdef pg_get_triggerdef pg_get_userbyid pg_get_viewdef pg_has_role
    pg_identify_object pg_index_column_has_property pg_index_has_property pg_indexam_has_property
    pg_is_other_temp_schema pg_my_temp_schema pg_opclass_is_visible pg_options_to_table pg_operator_is_visible
    pg_partition_root pg_relation_filenode pg_relation_is_publishable pg_relation_is_updatable
    pg_sequence_parameters pg_table_is_visible pg_tablespace_location pg_type_is_visible pg_typeof
    row_security_active shobj_description to_regclass to_regcollation to_regnamespace to_regoper
    to_regoperator to_regproc to_regprocedure to_regrole to_regtype
""")
# The session and the server, looked at
_SESSION: Final = _names("""
    current_database current_schema current_schemas current_setting current_user getdatabaseencoding
    inet_client_addr inet_client_port inet_server_addr inet_server_port pg_backend_pid pg_conf_load_time
    pg_current_snapshot pg_postmaster_start_time pg_snapshot_xip pg_snapshot_xmax pg_snapshot_xmin
    pg_visible_in_snapshot pg_wal_lsn_diff session_user version
    pg_stat_get_activity pg_stat_get_dead_tuples pg_stat_get_live_tuples pg_stat_get_numscans
""")
PURE: Final = frozenset().union(
    # Aggregates and window functions
    _names("""
        array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count covar_pop covar_samp every json_agg
        json_object_agg jsonb_agg jsonb_object_agg max min range_agg range_intersect_agg regr_avgx regr_avgy
        regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy stddev stddev_pop stddev_samp
        string_agg sum var_pop var_samp variance xmlagg
        mode percentile_cont percentile_disc
        cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number
    """),
    # Numbers
    _names("""
        abs acos acosd acosh asin asind asinh atan atan2 atan2d atand atanh cbrt ceil ceiling cos cosd cosh
        cot cotd degrees div exp factorial floor gcd lcm ln log log10 min_scale mod pi pow power radians round
        scale sign sin sind sinh sqrt tan tand tanh trim_scale trunc width_bucket
    """),
    # Text and binary
    _names("""
        ascii bit_count bit_length btrim char_length character_length chr concat concat_ws convert
        convert_from convert_to decode encode format get_bit get_byte initcap is_normalized left length lower
        lpad ltrim md5 normalize octet_length overlay parse_ident position quote_ident quote_literal
        quote_nullable regexp_count regexp_instr regexp_like regexp_match regexp_matches regexp_replace
        regexp_split_to_array regexp_split_to_table regexp_substr repeat replace reverse right rpad rtrim
        set_bit set_byte sha224 sha256 sha384 sha512 split_part starts_with string_to_array string_to_table
        strpos substr substring to_ascii to_hex translate unistr upper like like_escape notlike similar_escape
        similar_to_escape hashtext hashtextextended hashint4 hashint4extended hashint8 hashint8extended
    """),
    # Conversions written as calls
    _names("""
        bool bpchar char date float4 float8 int2 int4 int8 interval macaddr8 money name numeric oid
        regclass text time timestamp timestamptz timetz varchar xml
        to_char to_date to_number to_timestamp pg_size_bytes pg_size_pretty
    """),
    # Dates and times
    _names("""
        age date_bin date_part date_trunc extract isfinite justify_days justify_hours justify_interval
        make_date make_interval make_time make_timestamp make_timestamptz now overlaps statement_timestamp
        timezone transaction_timestamp
    """),
    # Arrays, ranges, sets of rows
    _names("""
        array_append array_cat array_dims array_fill array_length array_lower array_ndims array_position
        array_positions array_prepend array_remove array_replace array_to_string array_upper cardinality
        trim_array unnest generate_series generate_subscripts num_nonnulls num_nulls
        enum_first enum_last enum_range
        daterange int4range int8range numrange tsrange tstzrange datemultirange int4multirange int8multirange
        nummultirange tsmultirange tstzmultirange multirange isempty lower_inc lower_inf range_merge upper_inc
        upper_inf
    """),
    # JSON and XML
    _names("""
        array_to_json json_array_elements json_array_elements_text json_array_length json_build_array
        json_build_object json_each json_each_text json_extract_path json_extract_path_text json_object
        json_object_keys json_populate_record json_populate_recordset json_strip_nulls json_to_record
        json_to_recordset json_typeof jsonb_array_elements jsonb_array_elements_text jsonb_array_length
        jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path
        jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_keys jsonb_path_exists
        jsonb_path_exists_tz jsonb_path_match jsonb_path_match_tz jsonb_path_query jsonb_path_query_array
        jsonb_path_query_array_tz jsonb_path_query_first jsonb_path_query_first_tz jsonb_path_query_tz
        jsonb_populate_record jsonb_populate_recordset jsonb_pretty jsonb_set jsonb_set_lax jsonb_strip_nulls
        jsonb_to_record jsonb_to_recordset jsonb_typeof row_to_json to_json to_jsonb
        xml_is_well_formed xml_is_well_formed_content xml_is_well_formed_document xmlcomment xmlexists xpath
        xpath_exists
    """),
    # Text search
    _names("""
        array_to_tsvector get_current_ts_config json_to_tsvector jsonb_to_tsvector numnode phraseto_tsquery
        plainto_tsquery querytree setweight strip to_tsquery to_tsvector ts_debug ts_delete ts_filter
        ts_headline ts_lexize ts_parse ts_rank ts_rank_cd ts_token_type tsquery_phrase tsvector_to_array
        websearch_to_tsquery
    """),
    # Geometry, networks
    _names("""
        area box bound_box center circle diameter height isclosed isopen isparallel isperp line lseg npoints
        path pclose point polygon popen radius slope width abbrev broadcast family host hostmask inet_merge
        inet_same_family macaddr8_set7bit masklen netmask network set_masklen
    """),
    _CATALOGUE,
    _SESSION,
)
"""Every overload is immutable or stable, and none writes, blocks, executes SQL or touches the session."""

VOLATILE_BUT_HARMLESS: Final[dict[str, str]] = {
    "clock_timestamp": "another value each time, no other effect",
    "timeofday": "another value each time, no other effect",
    "random": "advances a generator; only setseed, which is not on the list, would make that visible",
    "gen_random_uuid": "another value each time, no other effect",
    "pg_sleep": "only waits",
    "pg_sleep_for": "only waits",
    "pg_sleep_until": "only waits",
    "pg_blocking_pids": "looks at the lock table",
    "pg_current_wal_flush_lsn": "looks at shared memory",
    "pg_current_wal_insert_lsn": "looks at shared memory",
    "pg_current_wal_lsn": "looks at shared memory",
    "pg_database_size": "adds up file sizes",
    "pg_indexes_size": "adds up file sizes",
    "pg_is_in_recovery": "looks at shared memory",
    "pg_last_wal_receive_lsn": "looks at shared memory",
    "pg_last_wal_replay_lsn": "looks at shared memory",
    "pg_last_xact_replay_timestamp": "looks at shared memory",
    "pg_partition_ancestors": "looks at the catalogue",
    "pg_partition_tree": "looks at the catalogue",
    "pg_relation_size": "adds up file sizes",
    "pg_table_size": "adds up file sizes",
    "pg_tablespace_size": "adds up file sizes",
    "pg_total_relation_size": "adds up file sizes",
    "pg_xact_status": "looks at the commit log",
}
"""Volatile, yet a second execution is harmless and no session state is touched: name → why."""

READ: Final = PURE | VOLATILE_BUT_HARMLESS.keys()
"""What a read may call, without a schema or as ``pg_catalog.name``."""

NEWER: Final = _names("""
    any_value array_reverse array_sort bytea casefold crc32 crc32c date_add date_subtract erf erfc gamma
    json_agg_strict json_object_agg_strict json_object_agg_unique json_object_agg_unique_strict
    jsonb_agg_strict jsonb_object_agg_strict jsonb_object_agg_unique jsonb_object_agg_unique_strict lgamma
    pg_basetype pg_input_error_info pg_input_is_valid system_user to_bin to_oct to_regtypemod unicode_version
    uuid_extract_timestamp uuid_extract_version xmltext
""")
"""Like PURE, but missing in PostgreSQL 15: there the bare name can only be a function of the user.

So they count only when written ``pg_catalog.name``.
"""

NEWER_VOLATILE: Final = _names("random_normal uuidv4 uuidv7")
"""Like VOLATILE_BUT_HARMLESS, but missing in PostgreSQL 15."""

CLOCK: Final = _names("age now statement_timestamp transaction_timestamp")
"""Functions of PURE that depend on when the transaction or message began: equal for all rows of a group."""

STEADY: Final = (PURE | NEWER) - CLOCK - _CATALOGUE - _SESSION
"""The same answer for the same arguments and settings, whatever the time and the catalogue."""

FORBIDDEN: Final = _names("""
    brin_desummarize_range brin_summarize_new_values brin_summarize_range currtid2 currval cursor_to_xml
    cursor_to_xmlschema database_to_xml database_to_xml_and_xmlschema database_to_xmlschema
    gin_clean_pending_list lastval lo_close lo_creat lo_create lo_export lo_from_bytea lo_get lo_import
    lo_lseek lo_lseek64 lo_open lo_put lo_tell lo_tell64 lo_truncate lo_truncate64 lo_unlink loread lowrite
    nextval pg_advisory_lock pg_advisory_lock_shared pg_advisory_unlock pg_advisory_unlock_all
    pg_advisory_unlock_shared pg_advisory_xact_lock pg_advisory_xact_lock_shared pg_backup_start
    pg_backup_stop pg_cancel_backend pg_clear_attribute_stats pg_clear_relation_stats
    pg_copy_logical_replication_slot pg_copy_physical_replication_slot pg_create_logical_replication_slot
    pg_create_physical_replication_slot pg_create_restore_point pg_current_xact_id
    pg_current_xact_id_if_assigned pg_drop_replication_slot pg_export_snapshot pg_hba_file_rules
    pg_ident_file_mappings pg_import_system_collations pg_log_backend_memory_contexts pg_log_standby_snapshot
    pg_logical_emit_message pg_logical_slot_get_binary_changes pg_logical_slot_get_changes
    pg_logical_slot_peek_binary_changes pg_logical_slot_peek_changes pg_ls_archive_statusdir pg_ls_dir
    pg_ls_logdir pg_ls_logicalmapdir pg_ls_logicalsnapdir pg_ls_replslotdir pg_ls_tmpdir pg_ls_waldir
    pg_nextoid pg_notify pg_promote pg_read_binary_file pg_read_file pg_reload_conf
    pg_replication_origin_advance pg_replication_origin_create pg_replication_origin_drop
    pg_replication_origin_session_reset pg_replication_origin_session_setup pg_replication_origin_xact_reset
    pg_replication_origin_xact_setup pg_replication_slot_advance pg_restore_attribute_stats
    pg_restore_relation_stats pg_rotate_logfile pg_show_all_file_settings pg_stat_clear_snapshot pg_stat_file
    pg_stat_force_next_flush pg_stat_reset pg_stat_reset_replication_slot pg_stat_reset_shared
    pg_stat_reset_single_function_counters pg_stat_reset_single_table_counters pg_stat_reset_slru
    pg_stat_reset_subscription_stats pg_stop_making_pinned_objects pg_switch_wal pg_sync_replication_slots
    pg_terminate_backend pg_try_advisory_lock pg_try_advisory_lock_shared pg_try_advisory_xact_lock
    pg_try_advisory_xact_lock_shared pg_wal_replay_pause pg_wal_replay_resume query_to_xml
    query_to_xml_and_xmlschema query_to_xmlschema schema_to_xml schema_to_xml_and_xmlschema
    schema_to_xmlschema set_config setseed setval table_to_xml table_to_xml_and_xmlschema table_to_xmlschema
    ts_rewrite ts_stat txid_current txid_current_if_assigned unique_key_recheck
""")
"""Traps, named so that a test keeps them off the lists: they write, lock, read server files, run SQL, or
depend on or change the session, whatever volatility the catalogue gives them.
"""

LOCAL: Final = _names("""
    current_setting currval inet_client_addr inet_client_port inet_server_addr inet_server_port lastval
    pg_advisory_lock pg_advisory_lock_shared pg_advisory_unlock pg_advisory_unlock_all pg_advisory_unlock_shared
    pg_advisory_xact_lock pg_advisory_xact_lock_shared pg_backend_pid pg_blocking_pids pg_cancel_backend
    pg_conf_load_time pg_config pg_current_logfile pg_current_snapshot pg_current_wal_flush_lsn
    pg_current_wal_insert_lsn pg_current_wal_lsn pg_cursor pg_export_snapshot pg_is_in_recovery
    pg_is_other_temp_schema pg_last_wal_receive_lsn pg_last_wal_replay_lsn pg_last_xact_replay_timestamp
    pg_listening_channels pg_lock_status pg_my_temp_schema pg_postmaster_start_time pg_prepared_statement
    pg_reload_conf pg_safe_snapshot_blocking_pids pg_sequence_last_value pg_settings_get_flags
    pg_show_all_settings pg_stat_get_activity pg_stat_get_dead_tuples pg_stat_get_live_tuples
    pg_stat_get_numscans pg_terminate_backend pg_try_advisory_lock pg_try_advisory_lock_shared
    pg_try_advisory_xact_lock pg_try_advisory_xact_lock_shared pg_xact_status set_config setseed
    txid_current_snapshot txid_status
""")
"""About one server, or one session of it: its settings, locks, statistics, connections, and the position in its WAL.
Another server has another answer, though no data differ."""

LOCAL_RELATIONS: Final = _names("""
    pg_aios pg_available_extension_versions pg_available_extensions pg_backend_memory_contexts pg_config pg_cursors
    pg_dsm_registry_allocations pg_file_settings pg_hba_file_rules pg_ident_file_mappings pg_locks
    pg_prepared_statements pg_prepared_xacts pg_replication_origin_status pg_replication_slots pg_sequences
    pg_settings pg_shmem_allocations pg_shmem_allocations_numa
""")
"""Views of ``pg_catalog`` of that kind, beside all that begin with ``pg_stat_`` or ``pg_statio_``."""
