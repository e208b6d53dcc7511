CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.choices (
    number bigint NOT NULL,
    owner character varying(64) NOT NULL,
    profile_id character varying(128) NOT NULL,
    created_at double precision NOT NULL,
    differences json NOT NULL,
    chosen_hash character varying(64) NOT NULL,
    rejected_hash character varying(64) NOT NULL,
    messages_hash character varying(64) NOT NULL,
    request_id character varying(128),
    text json
);
CREATE SEQUENCE public.choices_number_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.choices_number_seq OWNED BY public.choices.number;
CREATE TABLE public.profiles (
    owner character varying(64) NOT NULL,
    id character varying(128) NOT NULL,
    created_at double precision NOT NULL,
    description text DEFAULT ''::text NOT NULL,
    weights json DEFAULT '{}'::json NOT NULL
);
ALTER TABLE ONLY public.choices ALTER COLUMN number SET DEFAULT nextval('public.choices_number_seq'::regclass);
INSERT INTO public.alembic_version VALUES ('start');
INSERT INTO public.choices VALUES (1, '762c08fc17a1cc5f00d248f8b50f2f2f4d17ff2934ac31e64deacb3f5bb3f2ec', 'ada', 1795919670.4138243, '{"brevity": 4.0, "owls": 1.0}', 'cdf41be293bd0a8c37fd812272936dd76633ba2fb1a702634a4ccf187e262009', 'a6ad4585297f60dcd02f92bc87e5361c8913f97fb733864617e93e9b2e055a04', '35e702091734948c24e6038ed49c045169131f9ac8147757abb6f75f0b76cbc4', 'r1', '{"chosen": "In H\u00f6hlen, an owl.", "rejected": "In H\u00f6hlen, und manchmal auch in alten Scheunen.", "messages": [{"role": "user", "content": "Wie wohnen Eulen? \ud83e\udd89"}]}');
INSERT INTO public.choices VALUES (2, '762c08fc17a1cc5f00d248f8b50f2f2f4d17ff2934ac31e64deacb3f5bb3f2ec', 'ada', 1795919670.5864003, '{"brevity": 4.0, "owls": 0.0}', '32d54be3f4d22e0484ab1d137efaad20bff9ac337f24211c44041327a9cf6f6c', '31454cf1ecacb53f597dd774cd717924a75c1622925ea16c13f78edf5c2ae460', '35e702091734948c24e6038ed49c045169131f9ac8147757abb6f75f0b76cbc4', 'r2', '{"chosen": "owl", "rejected": "an owl and a vole", "messages": [{"role": "user", "content": "Wie wohnen Eulen? \ud83e\udd89"}]}');
INSERT INTO public.choices VALUES (3, '762c08fc17a1cc5f00d248f8b50f2f2f4d17ff2934ac31e64deacb3f5bb3f2ec', 'ada', 1795919670.6188524, '{"brevity": 1.0, "owls": 0.0}', '0eb5b8d6f81bc677da8a08567cc4fa9a06a57e9ec8da85ed73a7f62727996002', '5c081872068d482115a28e64372b22fc567261d97aabec8d903ea86bc2308a8f', '35e702091734948c24e6038ed49c045169131f9ac8147757abb6f75f0b76cbc4', NULL, '{"chosen": "a", "rejected": "d e f", "messages": [{"role": "user", "content": "Wie wohnen Eulen? \ud83e\udd89"}]}');
INSERT INTO public.choices VALUES (4, '762c08fc17a1cc5f00d248f8b50f2f2f4d17ff2934ac31e64deacb3f5bb3f2ec', 'ada', 1795919670.618854, '{"brevity": 0.5, "owls": 0.0}', '0564b0861c488323e7c9fcd1f5dfce7350b12e077b469c6346f5d993ff9a3d8a', '5c081872068d482115a28e64372b22fc567261d97aabec8d903ea86bc2308a8f', '35e702091734948c24e6038ed49c045169131f9ac8147757abb6f75f0b76cbc4', NULL, '{"chosen": "b c", "rejected": "d e f", "messages": [{"role": "user", "content": "Wie wohnen Eulen? \ud83e\udd89"}]}');
INSERT INTO public.profiles VALUES ('762c08fc17a1cc5f00d248f8b50f2f2f4d17ff2934ac31e64deacb3f5bb3f2ec', 'ada', 1795919670.4134517, 'Likes short answers.', '{"brevity": 2.0}');
SELECT pg_catalog.setval('public.choices_number_seq', 4, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.choices
    ADD CONSTRAINT choices_pkey PRIMARY KEY (number);
ALTER TABLE ONLY public.profiles
    ADD CONSTRAINT profiles_pkey PRIMARY KEY (owner, id);
CREATE INDEX choices_of_profile ON public.choices USING btree (owner, profile_id, number);
