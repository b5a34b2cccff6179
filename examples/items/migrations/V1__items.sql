CREATE TABLE items (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL CONSTRAINT items_name_key UNIQUE,
    price_cents bigint NOT NULL CHECK (price_cents >= 0),
    stock bigint NOT NULL CONSTRAINT items_stock_check CHECK (stock >= 0)
);
