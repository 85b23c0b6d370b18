"""Plans a run on TPUs before they are rented: the memory that it needs, and a bound on its speed."""
