-- What the statements of the corpus name. Run by a plain user who owns the schema and is not above row-level security.

create table users (
    id int primary key, name text not null, email text, active boolean not null default true, age int,
    created timestamptz not null default '2020-01-01 00:00+00', tags text[] not null default '{}',
    profile jsonb not null default '{}', balance numeric(12, 2) not null default 0
);
create table orders (
    id serial primary key, user_id int references users, amount numeric not null, placed date not null, note text
);
create table audit (id serial primary key, what text);
create table days (id int, day date not null) partition by range (day);
create table days_2020 partition of days for values from ('2020-01-01') to ('2021-01-01');
create table days_2021 partition of days for values from ('2021-01-01') to ('2022-01-01');
create table parent (a int);
create unlogged table child () inherits (parent);
create unlogged table scratch (a int);
create sequence counter;
create type mood as enum ('sad', 'fine', 'happy');
create type pair as (x int, y int);
create table pairs (id int primary key, p pair, m mood);
create table "Mixed Case" ("Some Id" int, "select" text);
create table logged_shadow (a int, writes int);

insert into users (id, name, email, age, tags, profile)
    select n, 'user ' || n, 'user' || n || '@example.org', 20 + n, array['a', 'b'], '{"x": {"y": 1}, "list": [1, 2]}'
    from generate_series(1, 20) n;
insert into orders (user_id, amount, placed, note)
    select 1 + n % 20, n * 1.5, date '2020-01-01' + n, 'note ' || n from generate_series(1, 60) n;
insert into days values (1, '2020-05-05'), (2, '2021-05-05');
insert into parent values (1);
insert into pairs values (1, row(1, 2), 'fine'), (2, row(3, 4), 'happy');
insert into "Mixed Case" values (1, 'one');
insert into logged_shadow values (1, 2);

-- functions that only read
create function double_it(int) returns int language sql immutable as 'select $1 * 2';
create function user_count() returns bigint language sql stable as 'select count(*) from users';
create function user_count_undeclared() returns bigint language sql as 'select count(*) from users';
create function users_older(int) returns setof users language sql stable as 'select * from users where age > $1';
create function name_of(int) returns text language sql stable begin atomic select name from users where id = $1; end;
create function plus_one(a int) returns int language sql immutable return a + 1;
create function average_of(int) returns numeric language plpgsql stable as $$
declare result numeric;
begin
    -- execute is only a word here, and so is nextval('counter')
    select avg(amount) into result from orders where user_id = $1;
    if result is null then
        raise notice 'no orders of %', $1;
        return coalesce(double_it($1), 0);
    end if;
    return round(result, 2);
exception when division_by_zero then
    return null;
end $$;
create function label(users) returns text language sql stable as $$ select $1.name || ' <' || $1.email || '>' $$;
create aggregate product(numeric) (sfunc = numeric_mul, stype = numeric, initcond = '1');
create function "Read Me"() returns int language sql stable as 'select 1';
create function is_even(int) returns boolean language sql immutable as 'select $1 % 2 = 0';

-- functions that write, or worse
create function note_it(text) returns text language sql as 'insert into audit (what) values ($1) returning what';
create function note_it_slowly(text) returns text language plpgsql as $$
begin insert into audit (what) values ($1); return $1; end $$;
create function sneaky(text) returns text language plpgsql stable as $$ begin return note_it($1); end $$;
create function sneaky_sql(text) returns text language sql stable as 'select note_it($1)';
create function deep(text) returns text language sql stable as 'select sneaky_sql($1)';
create function deepest(text) returns text language plpgsql immutable as $$ begin return deep($1); end $$;
create function dynamic(text) returns int language plpgsql stable as $$
declare result int; begin execute $1 into result; return result; end $$;
create function next_default(a bigint default nextval('counter')) returns bigint language sql stable as 'select $1';
create function thing(int) returns int language sql immutable as 'select $1';
create function thing(text) returns text language sql as 'select note_it($1)';
create function reverse(int) returns text language sql as $$ select note_it($1::text) $$;
create function stamp(users) returns text language sql as $$ select note_it($1.name) $$;
create function writes(logged_shadow) returns text language sql as $$ select note_it('x') $$;
create function add_up(int, int) returns int language plpgsql as $$
begin insert into audit (what) values ('sum'); return coalesce($1, 0) + $2; end $$;
create aggregate noisy_sum(int) (sfunc = add_up, stype = int, initcond = '0');
create function locks_it() returns void language sql as 'select pg_advisory_lock(7)';
create function sets_it() returns text language sql stable as $$ select set_config('work_mem', '7MB', false) $$;
create function locks_rows() returns setof users language sql as 'select * from users where id = 1 for update';
create function atomic_writer() returns int language sql begin atomic insert into audit (what) values ('a') returning 1; end;
create procedure tidy() language sql as 'delete from audit';
create procedure tidy_slowly() language plpgsql as $$ begin delete from audit; end $$;

-- operators
create operator === (leftarg = int, rightarg = int, function = int4eq);
create function equal_and_note(text, text) returns boolean language sql as $$ select note_it($1) = $2 $$;
create operator ==== (leftarg = text, rightarg = text, function = equal_and_note);

-- domains and casts
create domain positive as int check (value > 0);
create function watched_ok(text) returns boolean language plpgsql as $$
begin insert into audit (what) values ($1); return true; end $$;
create domain watched as text check (watched_ok(value));
create table watching (id int, w watched);
insert into watching values (1, null);
create type celsius as (degrees numeric);
create type kelvin as (degrees numeric);
create function warm(celsius) returns kelvin language sql immutable as 'select row($1.degrees + 273.15)::kelvin';
create function warm_loudly(kelvin) returns celsius language sql as
    $$ select row(length(note_it($1.degrees::text)))::celsius $$;
create cast (celsius as kelvin) with function warm(celsius);
create cast (kelvin as celsius) with function warm_loudly(kelvin);
create table weather (id int, temperature kelvin);
insert into weather values (1, row(300)::kelvin);

-- views
create view active_users as select id, name, age from users where active;
create view big_spenders as
    select u.id, u.name, sum(o.amount) as spent from active_users u join orders o on o.user_id = u.id group by u.id, u.name;
create view with_function as select id, average_of(id) as average from users;
create view ticking as select nextval('counter') as n;
create view over_ticking as select n + 1 as n from ticking;
create view noting as select note_it(name) as noted from users;
create view locking as select pg_try_advisory_lock(8) as got;
create view over_scratch as select a from scratch;
create view over_settings as select current_setting('work_mem') as memory;
create view row_locking as select id from users for update;
create view over_operator as select 'a' ==== 'b' as same;
create view over_cast as select (temperature::celsius).degrees from weather;
create view over_sneaky as select sneaky('x') as s;
create materialized view totals as select user_id, sum(amount) as total from orders group by user_id;
create view insertable as select id, what from audit;
create rule insertable_insert as on insert to insertable do instead insert into audit (what) values (new.what);
create rule users_also as on update to orders do also insert into audit (what) values ('updated');

-- row-level security
create table owned (id int, owner text);
insert into owned values (1, current_user), (2, 'nobody');
alter table owned enable row level security;
alter table owned force row level security;
create policy mine on owned using (owner = current_user);
create table hidden (id int);
insert into hidden values (1);
alter table hidden enable row level security;
alter table hidden force row level security;
create policy noted on hidden using (note_it('seen') is not null);
create table tenants (id int, tenant text);
insert into tenants values (1, '5MB');
alter table tenants enable row level security;
alter table tenants force row level security;
create policy by_setting on tenants using (tenant <> current_setting('work_mem'));
create table inserted_only (id int);
insert into inserted_only values (1);
alter table inserted_only enable row level security;
create policy everybody on inserted_only for select using (true);
create policy checked on inserted_only for insert with check (note_it('checked') is not null);
