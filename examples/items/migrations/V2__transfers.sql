CREATE TABLE transfers (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source bigint NOT NULL REFERENCES items ON DELETE CASCADE,
    target bigint NOT NULL REFERENCES items ON DELETE CASCADE,
    quantity bigint NOT NULL CHECK (quantity > 0),
    at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON transfers (source);
CREATE INDEX ON transfers (target);
